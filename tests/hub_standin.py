"A stand-in for the hub's HTTP API on 127.0.0.1: repositories, large files, commits and downloads, as huggingface_hub asks for them"
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Hub(ThreadingHTTPServer):
    "Holds `repos`: {name: dict(private, files, commits)}; knows one token; `broken` makes it answer a request with a status"
    def __init__(self, token):
        super().__init__(('127.0.0.1', 0), Handler)
        self.token, self.repos, self.objects, self.asked, self.broken = token, {}, {}, [], {}
        self.url = f'http://127.0.0.1:{self.server_port}'
    def __enter__(self): threading.Thread(target=self.serve_forever, daemon=True).start(); return self
    def __exit__(self, *_): self.shutdown(); self.server_close()

class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *_): pass
    def say(self, status, body=b'', **headers):
        if not isinstance(body, bytes): body, headers['content_type'] = json.dumps(body).encode(), 'application/json'
        self.send_response(status)
        for k, v in (dict(content_length=len(body)) | headers).items(): self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def answer(self):
        hub, path = self.server, self.path.split('?')[0]
        body = self.rfile.read(int(self.headers.get('content-length') or 0)) if self.headers.get('transfer-encoding') != 'chunked' else self.chunks()
        known = self.headers.get('authorization') == f'Bearer {hub.token}'
        hub.asked.append((self.command, path, known))
        for part, status in hub.broken.items():
            if part in path: return self.say(status, {'error': f"not with {self.headers.get('authorization')}"})
        if m := re.fullmatch(r'/objects/(\w+)', path): hub.objects[m[1]] = body; return self.say(200)   # a signed address needs no token
        if m := re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)', path): return self.download(m[1], m[2], known)
        if not known: return self.say(401, {'error': 'Invalid credentials'}, x_error_message='Invalid credentials')
        for pattern, method in (('/api/validate-yaml', self.validate), ('/api/repos/create', self.create), (r'/api/models/([\w.-]+/[\w.-]+)', self.info), (r'/api/models/([\w.-]+/[\w.-]+)/preupload/main', self.preupload),
                (r'/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch', self.batch), (r'/api/models/([\w.-]+/[\w.-]+)/commit/main', self.commit)):
            if m := re.fullmatch(pattern, path): return method(*m.groups(), body)
        self.say(404, {'error': f'no such thing: {path}'})
    do_GET = do_HEAD = do_POST = do_PUT = answer

    def chunks(self):
        out = b''
        while n := int(self.rfile.readline(), 16): out += self.rfile.read(n); self.rfile.readline()
        self.rfile.readline()
        return out
    def validate(self, body): self.say(200, dict(errors=[], warnings=[]))
    def create(self, body):
        o = json.loads(body)
        name = f"{o['organization']}/{o['name']}"
        there = name in self.server.repos
        if not there: self.server.repos[name] = dict(private=o.get('visibility') == 'private' or o.get('private') is True, files={}, commits=[])
        self.say(409 if there else 200, dict(url=f'{self.server.url}/{name}'))
    def info(self, name, body):
        r = self.server.repos.get(name)
        self.say(404, {'error': 'Repository not found'}, x_error_code='RepoNotFound') if r is None else self.say(200, dict(id=name, private=r['private'], sha='0'*40, tags=[], downloads=0, likes=0, siblings=[dict(rfilename=f) for f in r['files']]))
    def preupload(self, name, body):
        self.say(200, dict(files=[dict(path=f['path'], uploadMode='lfs' if f['path'].endswith(('.safetensors', '.png')) else 'regular', shouldIgnore=False) for f in json.loads(body)['files']]))
    def batch(self, name, body):
        self.say(200, dict(transfer='basic', objects=[o | dict(actions=dict(upload=dict(href=f"{self.server.url}/objects/{o['oid']}"))) for o in json.loads(body)['objects']]))
    def commit(self, name, body):
        rows = [json.loads(o) for o in body.splitlines() if o]
        for r in rows:
            v = r['value']
            if r['key'] == 'file': self.server.repos[name]['files'][v['path']] = base64.b64decode(v['content'])
            if r['key'] == 'lfsFile': self.server.repos[name]['files'][v['path']] = self.server.objects[v['oid']]
        oid = hashlib.sha1(body).hexdigest()
        self.server.repos[name]['commits'].append(sorted(r['value']['path'] for r in rows if r['key'] != 'header'))
        self.say(200, dict(commitUrl=f'{self.server.url}/{name}/commit/{oid}', commitOid=oid))
    def download(self, name, path, known):
        r = self.server.repos.get(name)
        if r is None or (r['private'] and not known): return self.say(401 if not known else 404, {'error': 'Repository not found'}, x_error_code='RepoNotFound')
        if path not in r['files']: return self.say(404, {'error': 'Entry not found'}, x_error_code='EntryNotFound')
        data = r['files'][path]
        self.say(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit='0'*40, Accept_Ranges='bytes')
