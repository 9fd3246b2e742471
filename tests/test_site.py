"README and docs site come from the notebooks, through the one `_quarto.yml`, and every link leads somewhere"
import configparser
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
import pytest
import yaml

from kronos_nb.cli import parser
from kronos_nb.config import SECTIONS, Config
from tests.conftest import once

root = Path(__file__).resolve().parents[1]


def run(*arguments):
    "Run a tool of the repository"
    return subprocess.run([sys.executable, *arguments], cwd=root, text=True, capture_output=True, timeout=900)


def test_readme_is_current():
    done = run('tools/readme.py', '--check')
    assert done.returncode == 0, done.stderr


def test_readme_links_lead_somewhere():
    links = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s]+)', (root/'README.md').read_text())
    local = [o for o in links if not urlparse(o).scheme]
    assert local
    assert not [o for o in local if not (root/o).exists()]


def table_rows(text: str) -> list[list[str]]:
    "Return the cells of every row of the Markdown tables in `text`, without rulers"
    lines = [line for line in text.split('\n') if line.startswith('|') and not re.match(r'\|\s*-', line)]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_every_dependency_has_its_reason():
    "The README's tables and settings.ini name the same libraries"
    cfg = configparser.ConfigParser()
    cfg.read(root/'settings.ini')
    def named(key):
        return {re.match(r'[\w-]+', o)[0].lower() for o in cfg['DEFAULT'][key].split()}
    text = (root/'README.md').read_text()
    rows = table_rows(text[text.index('## What it depends on'):text.index('## Licence')])
    assert all(row[-1] for row in rows)
    libraries = {o.strip().lower() for row in rows if len(row) == 2 for o in row[0].split(',')} - {'library'}
    assert libraries == named('requirements')
    extras = {row[0]: set(row[1].split(', ')) for row in rows if len(row) == 3 and row[0] != 'extra'}
    assert extras == {k: named(f'{k}_requirements') for k in extras}
    assert {'tune', 'track', 'calendar', 'lora', 'plot'} <= set(extras)


def test_settings_agree():
    "pyproject.toml and settings.ini say the same about name and Python"
    cfg = configparser.ConfigParser()
    cfg.read(root/'settings.ini')
    project = (root/'pyproject.toml').read_text()
    assert re.search(r'^name\s*=\s*"(.+)"', project, re.M)[1] == cfg['DEFAULT']['lib_name']
    python = re.search(r'^requires-python\s*=\s*"(.+)"', project, re.M)[1]
    assert python == f">={cfg['DEFAULT']['min_python']}"


def test_quarto_yml():
    text = (root/'_quarto.yml').read_text()
    assert (root/'nbs'/'_quarto.yml').read_text() == text
    quarto = yaml.safe_load(text)
    assert quarto['project']['type'] == 'website'
    assert quarto['metadata-files'] == ['nbdev.yml', 'sidebar.yml']


def prose(nb: str) -> list[str]:
    "Return the Markdown cells of a notebook below `nbs`"
    return [c.source for c in nbformat.read(root/'nbs'/nb, 4).cells if c.cell_type == 'markdown']


# every name of theirs: config.py, config_loader.py, template and scripts of the reference, and the guides around them
THEIRS = """
qlib_data_path instrument dataset_begin_time dataset_end_time lookback_window predict_window max_context feature_list
time_feature_list train_time_range val_time_range test_time_range backtest_time_range dataset_path clip epochs
log_interval batch_size n_train_iter n_val_iter tokenizer_learning_rate predictor_learning_rate accumulation_steps
adam_beta1 adam_beta2 adam_weight_decay seed use_comet comet_config comet_tag comet_name save_path
tokenizer_save_folder_name predictor_save_folder_name backtest_save_folder_name backtest_result_path
pretrained_tokenizer_path pretrained_predictor_path finetuned_tokenizer_path finetuned_predictor_path
backtest_n_symbol_hold backtest_n_symbol_drop backtest_hold_thresh inference_T inference_top_p inference_top_k
inference_sample_count backtest_batch_size backtest_benchmark data.data_path data.lookback_window data.predict_window
data.max_context data.clip data.train_ratio data.val_ratio data.test_ratio training.tokenizer_epochs
training.basemodel_epochs training.epochs training.batch_size training.log_interval training.num_workers training.seed
training.tokenizer_learning_rate training.predictor_learning_rate training.adam_beta1 training.adam_beta2
training.adam_weight_decay training.accumulation_steps model_paths.pretrained_tokenizer
model_paths.pretrained_predictor model_paths.exp_name model_paths.base_path model_paths.base_save_path
model_paths.finetuned_tokenizer model_paths.tokenizer_save_name model_paths.basemodel_save_name experiment.name
experiment.description experiment.use_comet experiment.train_tokenizer experiment.train_basemodel
experiment.skip_existing experiment.pre_trained experiment.pre_trained_tokenizer experiment.pre_trained_predictor
device.use_cuda device.device_id distributed.use_ddp distributed.backend --symbol --config --skip-tokenizer
--skip-basemodel --skip-existing --device DIST_BACKEND --multi-gpu --num-gpus --test early_stopping_enabled
early_stopping_patience early_stopping_min_delta data_augmentation.enabled data_augmentation.noise_std
data_augmentation.dropout_rate data_augmentation.time_shift_max data_augmentation.scale_factor_range
scheduler_config.type scheduler_config.pct_start scheduler_config.div_factor scheduler_config.final_div_factor
scheduler_config.anneal_strategy gradient_clip_norm num_workers --use-full-data --data-files --max-data-size
--retrain-tokenizer --tokenizer-vocab-size --tokenizer-samples --learning-rate --max-steps --batch-size --warmup-steps
--save-steps --output-dir --plot-loss --max-cpu --max-memory --disable-monitoring --num-threads --dataloader-workers
--enable-compile --disable-optimizations --checkpoint_dir --num_checkpoints --output_name --pattern
SAVE_EVERY_LOGICAL_STEPS
""".split()


def comparison() -> list[list[str]]:
    "Return the rows of the tables that compare: (there, here, what to know)"
    rows = table_rows('\n'.join(prose('guides/02_coming_from_the_reference.ipynb')))
    return [row for row in rows if row[0] != 'there']


def quoted(text: str) -> list[str]:
    "Return what stands between back-quotes"
    return re.findall(r'`([^`]+)`', text)


def options(command: str) -> set[str]:
    "Return the options of a command"
    commands = next(a.choices for a in parser()._actions if 'fit' in (getattr(a, 'choices', None) or ()))
    assert command in commands, f'there is no command {command}'
    return set(commands[command]._option_string_actions)


def test_the_old_names_are_all_there():
    told = {word for row in comparison() for q in quoted(row[0]) for word in q.split()}
    assert not set(THEIRS) - told


def wrong_python(name: str) -> list[str]:
    "Return a complaint where a dotted name of the package does not exist"
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        return [f'{name}: {error}']
    return []


def wrong_options(text: str, command: str) -> list[str]:
    "Return the options in `text` that the command lacks"
    allowed = options(command) | (options('fit') if text.startswith('--') else set()) | {'--version'}
    return [o for o in re.findall(r'(?<!\S)--[\w-]+', text) if o not in allowed]


def wrong(text: str) -> list[str]:
    "Return the settings, options and Python names in `text` that do not exist"
    found, command, known = [], 'fit', set(Config().flat())
    for q in quoted(text):
        if m := re.match(r'!?kronos-nb ([a-z]+)', q):
            command = m[1]
        if q.startswith('kronos_nb.'):
            found += wrong_python(q)
            continue
        if q.startswith('pip'):
            continue
        if not q.startswith(('torchrun', 'tensorboard', 'accelerate', 'python')):
            found += wrong_options(q, command)
        if '/' not in q:
            found += [k for k in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.\w+", q) if k not in known]
    return found


def test_the_new_names_exist():
    rows = comparison()
    assert len(rows) > 100
    assert all(len(row) == 3 for row in rows)
    assert not [(row[0], w) for row in rows if (w := wrong(row[1]))]


@pytest.mark.parametrize('nb', ['01_how_it_works', '03_troubleshooting', '04_scaling_out'])
def test_guides_name_what_exists(nb):
    said = ' '.join(prose(f'guides/{nb}.ipynb'))
    assert not wrong(re.sub(r'```.*?```', '', said, flags=re.S))


def test_planted_names_are_found():
    assert wrong('`data.lookbak`') == ['data.lookbak']
    assert wrong('`kronos-nb fit --sett`') == ['--sett']
    assert wrong('`kronos_nb.forecast.Forcaster`')
    assert not wrong('`kronos-nb average --pattern`, `predictor.lr`, `kronos_nb.forecast.Forecaster`')


def test_the_template_of_the_reference_is_read():
    "Every key of the YAML that the reference ships has a place, or is said to have none"
    table = {word: row[1] for row in comparison() for word in quoted(row[0])}
    training = 'tokenizer_epochs basemodel_epochs batch_size log_interval num_workers seed'.split()
    template = dict(
        data=dict(data_path='x.csv', lookback_window=512, train_ratio=.9, val_ratio=.1, test_ratio=0.),
        training={k: 2 for k in training},
        model_paths=dict(pretrained_tokenizer='a', exp_name='e', base_path='b'),
        experiment=dict(name='n', description='d', skip_existing=False))
    said = {}
    Config.load(template, report=lambda line: said.update([line.split(': ')[0].split(' -> ')]))
    for key, new in said.items():
        if new == 'left out':
            assert table[key] == 'none' or 'kronos-nb' in table[key], key
        else:
            assert set(new.split(', ')) <= set(quoted(table[key])), key


# the site
@pytest.fixture(scope='session')
def site(tmp_path_factory):
    if sys.version_info < (3, 11):
        pytest.skip('smalldocs, which builds the site, needs Python 3.11')
    def make(folder):
        done = run('tools/docs.py', '--no-quarto')
        assert done.returncode == 0, done.stdout + done.stderr
    once(tmp_path_factory, 'site', make)
    return root/'_docs'


def test_pages_show_signatures_outputs_and_pictures(site):
    assert 'seed_everything' in (site/'api'/'0_ground'/'core.html').read_text()
    page = (site/'api'/'7_fit'/'train.html').read_text()
    assert 'out_dir' in page
    assert '<img' in page
    assert 'val_loss' in page


def test_signatures_are_tables(site):
    "Parameters stand in a table, examples are code, and no Markdown shows"
    page = (site/'api'/'7_fit'/'train.html').read_text()
    section = page[page.index('<h3 id="fit-1"'):]
    section = section[:section.index('<section')]
    assert '<td>overrides</td>' in re.sub(r'<td[^>]*>', '<td>', section)
    assert '&gt;&gt;&gt;' not in section
    assert '](http' not in section


def test_the_search_lists_guides_first(site):
    assert any('tutorials|guides' in p.read_text() for p in (site/'site_libs').glob('*.js'))


class Links(HTMLParser):
    "The links of a page and the places that it has"
    def __init__(self, page):
        super().__init__()
        self.found, self.ids = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ('href', 'src') and v]
        self.ids |= {v for k, v in attrs if k in ('id', 'name') and v}


def target_of(link: str, page: Path, site: Path) -> tuple[Path, str]:
    "Return the file and the place that a link of `page` points at"
    url = urlparse(link)
    if not url.path:
        return page, url.fragment
    base = site if url.path.startswith('/') else page.parent
    return (base/unquote(url.path.lstrip('/'))).resolve(), url.fragment


def dead_links(site: Path) -> list[tuple[str, str]]:
    "Return (page, link) of each link to a page or a place that is not there"
    pages, dead = {p.resolve(): Links(p) for p in site.rglob('*.html')}, set()
    for page, links in pages.items():
        for link in links.found:
            if urlparse(link).scheme or urlparse(link).netloc:
                continue
            target, place = target_of(link, page, site)
            lacks_place = place and target in pages and unquote(place) not in pages[target].ids
            if not target.exists() or lacks_place:
                dead.add((page.relative_to(site.resolve()).as_posix(), link))
    return sorted(dead)


def test_no_dead_links(site):
    assert not dead_links(site)


def test_planted_dead_links_are_found(tmp_path):
    links = ('b.html#there', 'b.html#gone', '#gone')
    (tmp_path/'a.html').write_text(''.join(f'<a href="{o}"></a>' for o in links) + '<img src="gone.png">')
    (tmp_path/'b.html').write_text('<h1 id="there"></h1><a href="a.html"></a>')
    assert [link for _, link in dead_links(tmp_path)] == ['#gone', 'b.html#gone', 'gone.png']
