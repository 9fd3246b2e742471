"""Requests a second, latency, wrong answers and memory of `kronos-nb serve`, with many clients at once

    OMP_NUM_THREADS=1 python benchmarks/serve.py --clients 50 --seconds 60 --paths 1 30
"""
import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time

import psutil

from kronos_nb.data.read import sample_klines
from kronos_nb.forecast import Forecaster

TOKEN, L, H, HISTORIES = 'a-token-for-measuring', 120, 24, 20
doge = sample_klines('DOGEUSDT')


def histories():
    return [doge.iloc[10*i:10*i + L] for i in range(HISTORIES)]


def bodies(paths):
    "Return requests, and the medians that a forecaster gives for each without a service"
    f, cut = Forecaster.from_pretrained('bundled'), histories()
    keys = [f'DOGEUSDT {c.timestamps.iloc[-1]}' for c in cut]
    made = f.predict_many(cut, H, keys=keys, paths=paths, progress=False)
    asked = []
    for c in cut:
        bars = {k: c[k].astype(str).tolist() if k in ('timestamps', 'symbol') else c[k].tolist() for k in c}
        asked.append(json.dumps(dict(bars=bars, symbol='DOGEUSDT', predict_window=H, paths=paths)))
    return asked, [m.quantile(.5)['close'].tolist() for m in made]


def start():
    "Start the service and return its process and port"
    command = [sys.executable, '-m', 'kronos_nb.cli', 'serve', '--model', 'bundled', '--port', '0']
    p = subprocess.Popen(command, env=os.environ | dict(KRONOS_NB_TOKEN=TOKEN), stdout=subprocess.PIPE, text=True)
    return p, int(re.search(r':(\d+),', p.stdout.readline())[1])


class Client(threading.Thread):
    "Ask one request after the other, over one connection, until a time"
    def __init__(self, number, port, asked, right, until):
        super().__init__(daemon=True)
        self.number, self.port, self.asked, self.right, self.until = number, port, asked, right, until
        self.seconds, self.wrong, self.lost = [], 0, []

    def run(self):
        connection, i = http.client.HTTPConnection('127.0.0.1', self.port, timeout=120), self.number
        headers = {'Authorization': f'Bearer {TOKEN}', 'Content-Type': 'application/json'}
        while time.perf_counter() < self.until:
            k, begun = i % len(self.asked), time.perf_counter()
            i += 1
            try:
                connection.request('POST', '/forecast', self.asked[k], headers)
                answer = connection.getresponse()
                said = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as e:
                self.lost.append(repr(e))
                connection.close()
                continue
            self.seconds.append(time.perf_counter() - begun)
            if answer.status != 200:
                self.lost.append(f'{answer.status} {said}')
            elif said['quantiles']['0.5'] != self.right[k]:
                self.wrong += 1


def load(p, port, clients, seconds, paths):
    "Run the clients and return one row of the table"
    asked, right = bodies(paths)
    warm = Client(0, port, asked, right, time.perf_counter() + 5)
    warm.start()
    warm.join()
    process = psutil.Process(p.pid)
    cpu, memory = sum(process.cpu_times()[:2]), [process.memory_info().rss/2**20]
    begun = time.perf_counter()
    team = [Client(i, port, asked, right, begun + seconds) for i in range(clients)]
    for c in team:
        c.start()
    while any(c.is_alive() for c in team):
        time.sleep(2)
        memory.append(process.memory_info().rss/2**20)
    spent, took = time.perf_counter() - begun, sorted(s for c in team for s in c.seconds)
    quarter = max(len(memory)//4, 1)
    lost = [o for c in team for o in c.lost]
    print('lost:', lost[:3], file=sys.stderr)
    cuts = statistics.quantiles(took, n=100)
    return dict(paths=paths, clients=clients, seconds=round(spent), answers=len(took), wrong=sum(c.wrong for c in team),
        lost=len(lost), per_second=round(len(took)/spent, 1), p50=round(cuts[49], 2), p95=round(cuts[94], 2),
        p99=round(cuts[98], 2), cpu_ms_per_answer=round(1000*(sum(process.cpu_times()[:2]) - cpu)/len(took), 1),
        mib_start=round(memory[0]), mib_by_quarter=' '.join(
            f'{statistics.mean(memory[i*quarter:(i + 1)*quarter]):.0f}' for i in range(4)), mib_end=round(memory[-1]))


if __name__ == '__main__':
    a = argparse.ArgumentParser()
    a.add_argument('--clients', type=int, nargs='+', default=[1, 50])
    a.add_argument('--seconds', type=float, default=60)
    a.add_argument('--paths', type=int, nargs='+', default=[1, 30])
    a = a.parse_args()
    p, port = start()
    try:
        rows = [load(p, port, n, a.seconds, paths) for paths in a.paths for n in a.clients]
    finally:
        p.terminate()
        print('exit code', p.wait(90), file=sys.stderr)
    print('| ' + ' | '.join(rows[0]) + ' |')
    print('|' + ' --- |'*len(rows[0]))
    for row in rows:
        print('| ' + ' | '.join(v if isinstance(v, str) else f'{v:,}' for v in row.values()) + ' |')
