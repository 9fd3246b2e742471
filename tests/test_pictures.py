"Pictures and displays: what is drawn is what was given, nothing collides, and results begin with their verdict"
import json
import re
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kronos_nb.config import Config
from kronos_nb.core import FEATURES, ConfigError, DataError
from kronos_nb.data.check import check_klines
from kronos_nb.data.normalize import ZScore
from kronos_nb.display import COLORS, figure, plain_text, png
from kronos_nb.forecast import Forecast, Forecaster, Forecasts
from kronos_nb.judging.baselines import Drift, LastValue, random_walks
from kronos_nb.decode.calibration import Calibration
from kronos_nb.judging.evaluation import LIGHTS, Evaluation
from kronos_nb.evaluate import evaluate
from kronos_nb.report import write_report
from kronos_nb.training.task import build_model

PNG = b'\x89PNG'


def candles(rng, shape, start, volume):
    "Return possible bars (..., 6) that begin at `start`"
    r = rng.normal(0, .01, (*shape, 4))
    close = start*np.exp(r[..., 0].cumsum(-1))
    first = np.broadcast_to(start, close[..., :1].shape)
    open_ = np.concatenate([first, close[..., :-1]], -1)
    top, bottom = (f(open_, close) for f in (np.maximum, np.minimum))
    v = volume*np.exp(20*r[..., 3])
    return np.stack([open_, top*np.exp(abs(r[..., 1])), bottom*np.exp(-abs(r[..., 2])), close, v, v*close], -1)


def made(n=60, H=10, S=20, freq='h', price=100., symbol='X', volume=1e6):
    "Return a forecast of random walks, and the bars that came true"
    rng, t = np.random.default_rng(0), pd.date_range('2024-01-31', periods=n + H, freq=freq)
    past = candles(rng, (n,), price, volume)
    paths, came = candles(rng, (S, H), past[-1, 3], volume), candles(rng, (H,), past[-1, 3], volume)
    actual = pd.DataFrame(came, columns=FEATURES).assign(timestamps=t[n:], symbol=symbol)
    return Forecast(paths, t[n:], pd.DataFrame(past, t[:n], FEATURES), symbol), actual


def judge(bars, origins=8, **kwargs):
    "Return an evaluation of a naive forecast on simulated bars"
    quick = dict(baselines=[Drift(), LastValue()], paths=5, progress=False, used={})
    return evaluate(LastValue(), bars, 60, 5, origins=origins, **quick | kwargs)


def line(fig, label):
    "Return the line of the first axes that is labelled so"
    return next(o for o in fig.axes[0].lines if o.get_label() == label)


@pytest.mark.parametrize('candles', [True, False])
def test_the_fan_begins_at_the_last_close(candles):
    f, actual = made()
    fig = f.plot(actual=actual, candles=candles)
    x, y = line(fig, 'median').get_data()
    assert (x[0], x[-1]) == (59, 69) and y[0] == f.last_close
    np.testing.assert_allclose(y[1:], np.median(f.paths[..., 3], 0))
    singles = [o for o in fig.axes[0].lines if len(o.get_xdata()) == 11 and o.get_linewidth() == .5]
    assert len(singles) == 5 and {o.get_ydata()[0] for o in singles} == {f.last_close}
    joined = [o for o in fig.axes[0].lines if to_hex(o.get_color()) == to_hex(COLORS['truth'])]
    assert min(o.get_xdata()[0] for o in joined) == 59


@pytest.mark.parametrize('zone', [None, 'UTC', 'America/New_York'])
@pytest.mark.parametrize('indexed', [True, False])
def test_what_happened_is_drawn_in_any_zone(zone, indexed):
    f, actual = made()
    if zone: actual['timestamps'] = actual.timestamps.dt.tz_localize('UTC').dt.tz_convert(zone)
    more = pd.concat([actual.assign(symbol='other', close=1.), actual], ignore_index=True)
    fig = f.plot(actual=more.set_index('timestamps') if indexed else more)
    x, y = line(fig, 'what happened').get_data()
    np.testing.assert_array_equal(x, range(60, 70))
    np.testing.assert_array_equal(y, actual.close)


def test_some_of_what_happened_is_drawn_and_none_is_an_error():
    f, actual = made()
    assert len(line(f.plot(actual=actual[3:7]), 'what happened').get_xdata()) == 4
    elsewhere = actual.assign(timestamps=actual.timestamps + pd.Timedelta('30min'))
    for bars in (elsewhere, actual[:0], actual.assign(symbol='other'), actual.close, actual[::-1]):
        with pytest.raises(DataError, match='actual'):
            f.plot(actual=bars)


@pytest.mark.parametrize('name', ['$SPX_$VIX', '$A$', r'a\$b$c', 'x'*200])
def test_any_name_can_be_drawn(name):
    f, actual = made(symbol=name)
    assert f._repr_png_().startswith(PNG) and Forecasts({name: f, 'B': f})._repr_png_().startswith(PNG)
    fig, ax = figure()
    ax.set_title(plain_text(name))
    assert png(fig).startswith(PNG)


def test_names_in_reports_can_be_drawn(tmp_path):
    walks = random_walks(400, ('$A$', '$B_$C'))
    png(check_klines(walks).plot())
    e = judge(walks, out_dir=tmp_path)
    assert png(e.plot()).startswith(PNG) and (tmp_path/'verdict.png').read_bytes().startswith(PNG)


def test_candles_are_hollow_up_and_filled_down():
    f, _ = made(30)
    fig = f.plot()
    rose = (f.history.close >= f.history.open).sum()
    faces = [to_hex(o.get_facecolor()) for o in fig.axes[0].patches]
    assert (faces.count('#ffffff'), faces.count('#000000')) == (rose, 30 - rose)
    assert len(fig.axes) == 2 and len(fig.axes[1].patches) == 30


def test_candles_need_room_and_volume():
    f, _ = made(120, 24)
    assert not f.plot().axes[0].patches and f.plot(candles=True).axes[0].patches
    assert f.plot(size=(20, 4)).axes[0].patches
    assert len(made(volume=0)[0].plot().axes) == 1
    _, ax = figure()
    assert len(f.plot(ax=ax).axes) == 1 and not ax.figure.legends
    assert made(S=1)[0].plot(candles=False).axes[0].collections[:] == []   # one path has no bands


def texts(fig):
    "Return the boxes of everything that is written in a figure"
    fig.draw_without_rendering()
    found = [t for ax in fig.axes for t in (*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label)]
    for axis in (a for ax in fig.axes for a in (ax.xaxis, ax.yaxis)):
        found += [t.label1 for t in axis._update_ticks() if t.label1.get_visible()] + [axis.get_offset_text()]
    found += [t for legend in fig.legends for t in legend.get_texts()] + fig.texts
    shown = [t for t in found if t.get_text() and t.get_visible()]
    return {f'{t.get_text()} {i}': t.get_window_extent() for i, t in enumerate(shown)}


def collisions(fig):
    "Return pairs of texts that overlap, texts that leave the figure, and legends that cover axes"
    boxes, whole = texts(fig), fig.bbox
    names = list(boxes)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i+1:] if boxes[a].shrunk(.98, .98).overlaps(boxes[b])]
    outside = [a for a, o in boxes.items() if o.x0 < -2 or o.y0 < -2 or o.x1 > whole.width+2 or o.y1 > whole.height+2]
    covered = [legend for legend in fig.legends for ax in fig.axes
               if legend.get_window_extent().overlaps(ax.get_window_extent())]
    return pairs + outside + covered


SHAPES = dict(daily=dict(freq='B'), hourly=dict(n=120, H=24), monthly=dict(n=36, H=6, freq='MS'), tiny=dict(price=1e-8),
              large=dict(price=1.2345e8), minute=dict(freq='5min', S=1), two=dict(n=2, H=1), long=dict(n=400, H=120))


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('size', [(12, 4), None, (5, 4)], ids=str)
def test_nothing_collides(shape, size):
    f, actual = made(**SHAPES[shape], symbol='a name that is rather long for a title')
    fig = f.plot(actual=actual, size=size)
    assert not collisions(fig)
    assert not any('+' in o.yaxis.get_offset_text().get_text() for o in fig.axes)   # no label needs a sum


def test_collisions_are_found():
    fig, ax = figure(3, 2)
    ax.set_xticks([0, .01, 1], ['a long label', 'another one', 'far'])
    ax.text(.5, .5, 'beyond the edge of the figure', fontsize=20)
    assert len(collisions(fig)) >= 2


def test_pictures_of_several_symbols_and_of_an_evaluation_do_not_collide():
    f, _ = made()
    fig = Forecasts({str(i): f for i in range(11)}).plot()
    assert not collisions(fig) and len(fig.axes) == 9 and '2 more' in fig._supxlabel.get_text()
    e = judge(random_walks(400))
    assert not collisions(e.plot()) and not collisions(e.plot_verdict())
    assert plt.get_fignums() == []


# Displays


def test_a_forecast_shows_picture_and_notes():
    f, _ = made()
    f.notes = ['a note about $these$ bars ' + 'that is long '*20]
    assert f._repr_png_().startswith(PNG) and 'a note' in repr(f)
    several = Forecasts(A=f, B=f)
    assert repr(several).count('After 10 bars') == 2 and len(several.to_frame()) == 2*20*10


def test_a_config_marks_what_changed():
    mine = Config.preset('doge', **{'predictor.lr': 1e-4})
    assert repr(mine) == 'Config(doge with predictor.lr=0.0001)' and repr(Config()) == 'Config(defaults)'
    shown, _, folded = mine._repr_html_().partition('<details>')
    rows = {tuple(re.findall('<td>(.*?)</td>', o))[1:5] for o in re.findall('<tr>.*?</tr>', shown, re.S)}
    assert ('lr', '0.0001', '0.0001', 'you') in rows and ('normalizer', 'median_mad', 'zscore', 'doge') in rows
    assert ('predict_window', '120', '10', 'doge') in rows and not any('clip' in row for row in rows)
    assert folded.count('<tr') == len(Config().flat()) + 1


@pytest.fixture(scope='module')
def judged():
    return judge(random_walks(500), 12)


def test_an_evaluation_begins_with_light_and_three_sentences(judged):
    text = judged.to_markdown()
    head = text.removeprefix('## Evaluation\n\n').split('\n')
    assert head[0] == f'**{judged.light}**' and len(judged.sentences) == 3
    assert [o.strip() for o in head[2:5]] == judged.sentences
    assert text.index(judged.sentences[2]) < text.index('| ')
    assert 'CRPS' in judged.sentences[1] and judged.sentence == ' '.join(judged.sentences)


def test_the_second_sentence_gives_the_differences_of_the_tests():
    e = judge(random_walks(500), 12, base=Drift())
    for who in ('base', e.best_naive):
        t = e.tests.loc[who]
        same = t['low'] == t['high'] == 0
        wanted = f"{100*abs(t['skill']):.1f} % {'lower' if t['skill'] >= 0 else 'higher'}"
        assert ('the same' if same else wanted) in e.sentences[1]


def test_every_column_has_its_key(judged):
    text = judged.to_markdown()
    keys = ' '.join(re.findall(r'^- \*\*(.+?)\*\*', text, re.M))
    for header in re.findall(r'^(\|.*\|)\n\| ---', text, re.M):
        for column in header.strip('| ').split(' | '):
            name = re.sub(r'^\d+ % | \(80 % power\)| for this skill', '', column)
            assert name == 'model' or name in keys, column


@pytest.mark.parametrize('verdict', LIGHTS)
def test_the_light_follows_the_verdict(judged, monkeypatch, verdict):
    monkeypatch.setattr(Evaluation, 'verdict', verdict)
    assert judged.summary.startswith(f'**{LIGHTS[verdict]}**')
    title = judged.plot_verdict().axes[0].get_title(loc='left')
    assert title.startswith(LIGHTS[verdict].partition(' ')[2])


def shown(thing, monkeypatch):
    "Return what a display sends: Markdown, or the kind of a picture"
    sent = []
    monkeypatch.setattr('IPython.display.display', lambda o, raw=False: sent.append(o))
    thing._ipython_display_()
    return [o['text/markdown'] if isinstance(o, dict) else 'picture' for o in sent]


def test_an_evaluation_displays_its_picture_above_its_tables(judged, monkeypatch):
    head, picture, tables = shown(judged, monkeypatch)
    assert head == judged.summary and picture == 'picture' and tables.count('| --- |') >= 2


# The report and the card of a run


def test_a_report_begins_with_the_verdict(quickstart, monkeypatch):
    from kronos_nb.train import load
    text, result = write_report(quickstart).read_text(), load(quickstart)
    e = result.evaluation
    begin = text.index('## Verdict\n')
    order = [begin, text.index(e.light), *map(text.index, e.sentences), text.index('![verdict]'), text.index('| ---')]
    assert order == sorted(order) and text[:begin].strip() == '# Run report'
    pictures = re.findall(r'!\[.*?\]\((.*?)\)', text[:text.index('## Data')])
    assert len(pictures) >= 4 and all((quickstart/p).is_file() for p in pictures)
    card = shown(result, monkeypatch)
    assert card[0] == e.summary and card[1] == 'picture' and e.light not in card[2] and 'Run folder' in card[2]


def test_a_model_records_interval_symbols_and_horizon(quickstart):
    for stage in ('tokenizer', 'predictor'):
        said = json.loads((quickstart/stage/'best_model'/'config.json').read_text())
        assert (said['interval'], said['predict_window'], list(said['trained_on'])) == (86400, 10, ['GOOG'])
    assert Forecaster.from_pretrained(quickstart).predict_window == 10


# The trained horizon, and warnings


@pytest.fixture
def trained():
    "Return a small forecaster that says it was trained on hourly bars of X, four bars ahead"
    models = (build_model(name, 'scratch', 'tiny').eval() for name in ('tokenizer', 'predictor'))
    f = Forecaster(*models, ZScore(), lookback_window=30)
    f.predictor.extra.update(predict_window=4, interval=3600., trained_on={'X': ['2020-01-01', '2021-01-01']})
    return Forecaster(f.tokenizer, f.predictor, lookback_window=30)


def walk(symbol='X', freq='h', n=40):
    return random_walks(n, (symbol,)).assign(amount=1., timestamps=pd.date_range('2024-01-01', periods=n, freq=freq))


def of_training(forecast): return [o for o in forecast.notes if o.startswith('the model was trained')]


def test_the_trained_horizon_is_the_default(trained):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        f, short = trained.predict(walk(), paths=2), trained.predict(walk(), 3, paths=2)
    assert len(f) == len(trained.predict_many([walk()], paths=2)[0]) == 4
    assert not of_training(f)
    np.testing.assert_allclose(short.paths, f.paths[:, :3], rtol=1e-5)   # a shorter one needs no warning
    learnt = Calibration(dict(temperature=1., top_k=0, top_p=.9), (1., 1.), 4, 1.,
        {'Kronos': .5, 'EWMA': .5}, *[{'Kronos': 1.}]*2, dates=20)
    wide = Forecaster(trained.tokenizer, trained.predictors, calibration=learnt)
    assert wide.predict_window == 4 and len(wide.predict(walk(), paths=2)) == 4


def test_models_without_a_horizon_ask_for_it(trained):
    trained.predictor.extra.clear()
    released = Forecaster(trained.tokenizer, trained.predictor, lookback_window=30)
    for ask in (released.predict, lambda bars, **kw: released.predict_many([bars], **kw)):
        with pytest.raises(ConfigError, match='predict_window'):
            ask(walk(), paths=2)
    assert len(released.predict(walk(), 2, paths=2)) == 2


OTHER = dict(interval=(walk(freq='D'), 4, '1 day'), symbol=(walk('Y'), 4, 'Y'), horizon=(walk(), 5, '5'))


@pytest.mark.parametrize('what', OTHER)
def test_a_forecast_unlike_training_warns_and_notes_it(trained, what):
    bars, H, named = OTHER[what]
    with pytest.warns(UserWarning, match=named) as seen:
        f = trained.predict(bars, H, paths=2)
    assert len(seen) == 1 and f.notes[-1] == str(seen[0].message)


def test_several_symbols_give_forecasts_and_one_warning_for_each_difference(trained):
    bars = pd.concat([walk(), walk('Y'), walk('Z')])
    with pytest.warns(UserWarning) as seen:
        found = trained.predict(bars, 5, paths=2)
    assert isinstance(found, Forecasts) and len(seen) == 3 and found._repr_png_().startswith(PNG)
    assert [len(of_training(f)) for f in found.values()] == [1, 2, 2]


def test_months_of_other_lengths_are_the_same_interval(trained):
    trained.predictor.extra['interval'] = 31*86400.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        trained.predict(walk(freq='MS')[1:4], 2, paths=2)
