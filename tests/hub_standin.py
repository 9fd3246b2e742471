"A stand-in for the hub's HTTP API on 127.0.0.1: repositories, large files, commits and downloads"
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = r'([\w.-]+/[\w.-]+)'


class Hub(ThreadingHTTPServer):
    "Holds `repos`: {name: dict(private, files, commits)}; knows one token; `broken` maps a part of a path to a status"

    def __init__(self, token):
        super().__init__(('127.0.0.1', 0), Handler)
        self.token = token
        self.repos, self.objects, self.asked, self.broken = {}, {}, [], {}
        self.url = f'http://127.0.0.1:{self.server_port}'

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    "Answers what huggingface_hub asks"
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        "Say nothing"

    def say(self, status, body=b'', **headers):
        "Answer with bytes, or with JSON"
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers['content_type'] = 'application/json'
        self.send_response(status)
        for name, value in (dict(content_length=len(body)) | headers).items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def read_body(self) -> bytes:
        "Return the body of the request, in one piece or in chunks"
        if self.headers.get('transfer-encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('content-length') or 0))
        out = b''
        while n := int(self.rfile.readline(), 16):
            out += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def answer(self):
        "Find the method for the path"
        hub, path, body = self.server, self.path.split('?')[0], self.read_body()
        known = self.headers.get('authorization') == f'Bearer {hub.token}'
        hub.asked.append((self.command, path, known))
        for part, status in hub.broken.items():
            if part in path:
                return self.say(status, {'error': f"not with {self.headers.get('authorization')}"})
        if m := re.fullmatch(r'/objects/(\w+)', path):   # a signed address needs no token
            hub.objects[m[1]] = body
            return self.say(200)
        if m := re.fullmatch(rf'/{REPO}/resolve/\w+/(.+)', path):
            return self.download(m[1], m[2], known)
        if not known:
            return self.say(401, {'error': 'Invalid credentials'}, x_error_message='Invalid credentials')
        for pattern, method in self.routes():
            if m := re.fullmatch(pattern, path):
                return method(*m.groups(), body)
        self.say(404, {'error': f'no such thing: {path}'})
    do_GET = do_HEAD = do_POST = do_PUT = answer

    def routes(self):
        "Return (pattern, method) of what a token is needed for"
        return (('/api/validate-yaml', self.validate), ('/api/repos/create', self.create),
                (f'/api/models/{REPO}', self.info), (f'/api/models/{REPO}/preupload/main', self.preupload),
                (rf'/{REPO}\.git/info/lfs/objects/batch', self.batch),
                (f'/api/models/{REPO}/commit/main', self.commit))

    def validate(self, body):
        self.say(200, dict(errors=[], warnings=[]))

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.server.repos
        if not there:
            private = asked.get('visibility') == 'private' or asked.get('private') is True
            self.server.repos[name] = dict(private=private, files={}, commits=[])
        self.say(409 if there else 200, dict(url=f'{self.server.url}/{name}'))

    def info(self, name, body):
        repo = self.server.repos.get(name)
        if repo is None:
            return self.say(404, {'error': 'Repository not found'}, x_error_code='RepoNotFound')
        files = [dict(rfilename=f) for f in repo['files']]
        self.say(200, dict(id=name, private=repo['private'], sha='0'*40, tags=[], downloads=0, likes=0, siblings=files))

    def preupload(self, name, body):
        def mode(path):
            return 'lfs' if path.endswith(('.safetensors', '.png')) else 'regular'
        paths = [f['path'] for f in json.loads(body)['files']]
        self.say(200, dict(files=[dict(path=p, uploadMode=mode(p), shouldIgnore=False) for p in paths]))

    def batch(self, name, body):
        def with_upload(o):
            return o | dict(actions=dict(upload=dict(href=f"{self.server.url}/objects/{o['oid']}")))
        self.say(200, dict(transfer='basic', objects=[with_upload(o) for o in json.loads(body)['objects']]))

    def commit(self, name, body):
        repo, rows = self.server.repos[name], [json.loads(o) for o in body.splitlines() if o]
        for row in rows:
            value = row['value']
            if row['key'] == 'file':
                repo['files'][value['path']] = base64.b64decode(value['content'])
            if row['key'] == 'lfsFile':
                repo['files'][value['path']] = self.server.objects[value['oid']]
        oid = hashlib.sha1(body).hexdigest()
        repo['commits'].append(sorted(r['value']['path'] for r in rows if r['key'] != 'header'))
        self.say(200, dict(commitUrl=f'{self.server.url}/{name}/commit/{oid}', commitOid=oid))

    def download(self, name, path, known):
        repo = self.server.repos.get(name)
        if repo is None or (repo['private'] and not known):
            return self.say(404 if known else 401, {'error': 'Repository not found'}, x_error_code='RepoNotFound')
        if path not in repo['files']:
            return self.say(404, {'error': 'Entry not found'}, x_error_code='EntryNotFound')
        data = repo['files'][path]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.say(200, data, ETag=etag, X_Repo_Commit='0'*40, Accept_Ranges='bytes')
