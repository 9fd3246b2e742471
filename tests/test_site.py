"README and docs site come from the notebooks, through the one `_quarto.yml`, and every link leads somewhere"
import importlib.util, pkgutil, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse
import nbformat, pytest, yaml
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from kronos_nb.cli import parser
from kronos_nb.config import SECTIONS, Config
root = Path(__file__).resolve().parents[1]
def run(*a): return subprocess.run([sys.executable, *a], cwd=root, text=True, capture_output=True, timeout=600)

def test_readme_is_current():
    r = run('tools/readme.py', '--check'); assert r.returncode==0, r.stderr

def test_readme_links_lead_somewhere():
    links = re.findall(r'(?:\]\(|(?:src|href)=")([^)"\s]+)', (root/'README.md').read_text())
    local = [o for o in links if not urlparse(o).scheme]
    assert local and all((root/o).exists() for o in local), [o for o in local if not (root/o).exists()]

def test_every_dependency_has_its_reason():
    "The README's tables and settings.ini name the same libraries"
    cfg, text = get_config(), (root/'README.md').read_text()
    part = text[text.index('## What it depends on'):text.index('## Licence')]
    rows = [[o.strip() for o in l.strip('|').split('|')] for l in part.split('\n') if l.startswith('|') and not l.startswith('|--')]
    said = {o.strip() for r in rows if len(r)==2 for o in r[0].split(',')} - {'library'}
    extras = {r[0]: set(r[1].split(', ')) for r in rows if len(r)==3 and r[0]!='extra'}
    names = lambda k: {re.match(r'[\w-]+', o)[0].lower() for o in cfg[k].split()}
    assert {o.lower() for o in said}==names('requirements') and all(r[-1] for r in rows)
    assert extras=={k: names(f'{k}_requirements') for k in extras} and {'tune', 'track', 'calendar', 'lora', 'plot'} <= set(extras)

def test_quarto_yml():
    q = yaml.safe_load((root/'_quarto.yml').read_text())
    assert (root/'nbs/_quarto.yml').read_text()==(root/'_quarto.yml').read_text()
    assert q['project']['type']=='website' and q['metadata-files']==['nbdev.yml', 'sidebar.yml']

def cells(nb): return [c.source for c in nbformat.read(root/'nbs'/nb, 4).cells if c.cell_type=='markdown']

def test_every_page_is_in_the_sidebar_once():
    "As the site shows it; and what the file names is there"
    spec = importlib.util.spec_from_file_location('docs', root/'tools/docs.py'); docs = importlib.util.module_from_spec(spec); spec.loader.exec_module(docs)
    shown = re.findall(r'\S+\.(?:ipynb|md)', docs.in_order(root/'nbs/sidebar.yml'))
    pages = [p.relative_to(root/'nbs').as_posix() for p in nbglob(root/'nbs', as_path=True)] + ['changelog.md']
    assert sorted(shown)==sorted(pages), set(shown) ^ set(pages)

# every name of theirs, from the reference's config.py, config_loader.py, its template and its scripts, and from the guides of the scripts around them
THEIRS = """qlib_data_path instrument dataset_begin_time dataset_end_time lookback_window predict_window max_context feature_list time_feature_list train_time_range
val_time_range test_time_range backtest_time_range dataset_path clip epochs log_interval batch_size n_train_iter n_val_iter tokenizer_learning_rate predictor_learning_rate
accumulation_steps adam_beta1 adam_beta2 adam_weight_decay seed use_comet comet_config comet_tag comet_name save_path tokenizer_save_folder_name
predictor_save_folder_name backtest_save_folder_name backtest_result_path pretrained_tokenizer_path pretrained_predictor_path finetuned_tokenizer_path
finetuned_predictor_path backtest_n_symbol_hold backtest_n_symbol_drop backtest_hold_thresh inference_T inference_top_p inference_top_k inference_sample_count
backtest_batch_size backtest_benchmark
data.data_path data.lookback_window data.predict_window data.max_context data.clip data.train_ratio data.val_ratio data.test_ratio training.tokenizer_epochs
training.basemodel_epochs training.epochs training.batch_size training.log_interval training.num_workers training.seed training.tokenizer_learning_rate
training.predictor_learning_rate training.adam_beta1 training.adam_beta2 training.adam_weight_decay training.accumulation_steps model_paths.pretrained_tokenizer
model_paths.pretrained_predictor model_paths.exp_name model_paths.base_path model_paths.base_save_path model_paths.finetuned_tokenizer model_paths.tokenizer_save_name
model_paths.basemodel_save_name experiment.name experiment.description experiment.use_comet experiment.train_tokenizer experiment.train_basemodel experiment.skip_existing
experiment.pre_trained experiment.pre_trained_tokenizer experiment.pre_trained_predictor device.use_cuda device.device_id distributed.use_ddp distributed.backend --symbol
--config --skip-tokenizer --skip-basemodel --skip-existing --device DIST_BACKEND --multi-gpu --num-gpus --test
early_stopping_enabled early_stopping_patience early_stopping_min_delta data_augmentation.enabled data_augmentation.noise_std data_augmentation.dropout_rate
data_augmentation.time_shift_max data_augmentation.scale_factor_range scheduler_config.type scheduler_config.pct_start scheduler_config.div_factor
scheduler_config.final_div_factor scheduler_config.anneal_strategy gradient_clip_norm num_workers
--use-full-data --data-files --max-data-size --retrain-tokenizer --tokenizer-vocab-size --tokenizer-samples --learning-rate --max-steps --batch-size --warmup-steps
--save-steps --output-dir --plot-loss --max-cpu --max-memory --disable-monitoring --num-threads --dataloader-workers --enable-compile --disable-optimizations
--checkpoint_dir --num_checkpoints --output_name --pattern SAVE_EVERY_LOGICAL_STEPS""".split()

def comparison():
    "The rows of the tables that compare: (there, here, what to know)"
    text = '\n'.join(cells('guides/02_coming_from_the_reference.ipynb'))
    return [[o.strip() for o in l.strip('|').split('|')] for l in text.split('\n') if l.startswith('|') and not l.startswith(('| there', '| ---'))]

def quoted(text): return re.findall(r'`([^`]+)`', text)
def options(command):
    sub = next(a for a in parser()._actions if getattr(a, 'choices', None) and 'fit' in a.choices).choices
    assert command in sub, f'there is no command {command}'
    return set(sub[command]._option_string_actions)

def test_the_old_names_are_all_there():
    left = {w for there, *_ in comparison() for q in quoted(there) for w in q.split()}
    assert not set(THEIRS) - left, sorted(set(THEIRS) - left)

def wrong(text):
    "The settings, options and Python names in `text` that do not exist here"
    bad, command, known = [], 'fit', set(Config().flat())
    for q in quoted(text):
        if m := re.match(r'!?kronos-nb ([a-z]+)', q): command = m[1]
        if q.startswith('kronos_nb.'):
            try: pkgutil.resolve_name(q)
            except (ImportError, AttributeError) as e: bad.append(f'{q}: {e}')
        elif not q.startswith(('pip', 'torchrun', 'tensorboard', 'accelerate', 'python')): bad += [o for o in re.findall(r'(?<!\S)--[\w-]+', q) if o!='--version' and o not in options(command) | (options('fit') if q.startswith('--') else set())]
        bad += [k for k in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.\w+", q) if k not in known and not q.startswith(('kronos_nb.', 'pip')) and '/' not in q]
    return bad

def test_the_new_names_exist():
    rows = comparison()
    assert len(rows) > 100 and all(len(r)==3 for r in rows)
    assert not (bad := [(r[0], w) for r in rows if (w := wrong(r[1]))]), bad

@pytest.mark.parametrize('nb', ['01_how_it_works', '03_troubleshooting', '04_scaling_out'])
def test_guides_name_what_exists(nb):
    said = ' '.join(c for c in cells(f'guides/{nb}.ipynb'))
    assert not wrong(re.sub(r'```.*?```', '', said, flags=re.S))

def test_planted_names_are_found():
    assert wrong('`data.lookbak`')==['data.lookbak'] and wrong('`kronos-nb fit --sett`')==['--sett'] and wrong('`kronos_nb.forecast.Forcaster`')
    assert not wrong('`kronos-nb average --pattern`, `predictor.lr`, `kronos_nb.forecast.Forecaster`')

def test_the_reference_s_template_is_read():
    "Every key of the YAML that the reference ships has a place, or is said to have none"
    table = {w: here for there, here, _ in comparison() for w in quoted(there)}
    said = {}
    yml = dict(data=dict(data_path='x.csv', lookback_window=512, train_ratio=.9, val_ratio=.1, test_ratio=0.), training={k: 2 for k in 'tokenizer_epochs basemodel_epochs batch_size log_interval num_workers seed'.split()},
        model_paths=dict(pretrained_tokenizer='a', exp_name='e', base_path='b'), experiment=dict(name='n', description='d', skip_existing=False))
    Config.load(yml, report=lambda l: said.update([l.split(': ')[0].split(' -> ')]))
    for k, new in said.items():
        if new!='left out': assert set(new.split(', ')) <= set(quoted(table[k])), k
        else: assert table[k]=='none' or 'kronos-nb' in table[k], k

@pytest.fixture(scope='module')
def site():
    r = run('tools/docs.py', '--no-quarto'); assert r.returncode==0, r.stdout+r.stderr
    return root/'_docs'

def test_pages_show_signatures_outputs_and_pictures(site):
    assert 'lookback_window' in (site/'api/core.html').read_text()
    page = (site/'api/train.html').read_text()
    assert 'out_dir' in page and '<img' in page and 'val_loss' in page

class Links(HTMLParser):
    def __init__(self, page): super().__init__(); self.found, self.ids = [], set(); self.feed(page.read_text())
    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ('href', 'src') and v]
        self.ids |= {v for k, v in attrs if k in ('id', 'name') and v}

def dead_links(site):
    "Links below `site` to a page that is not there, or to a place that it does not have"
    pages, dead = {p.resolve(): Links(p) for p in site.rglob('*.html')}, set()
    for page, links in pages.items():
        for link in links.found:
            u = urlparse(link)
            if u.scheme or u.netloc: continue
            target = (page if not u.path else site/u.path.lstrip('/') if u.path.startswith('/') else page.parent/unquote(u.path)).resolve()
            if not target.exists() or u.fragment and target in pages and unquote(u.fragment) not in pages[target].ids: dead.add((page.relative_to(site.resolve()).as_posix(), link))
    return sorted(dead)

def test_no_dead_links(site): assert not dead_links(site)

def test_planted_dead_links_are_found(tmp_path):
    (tmp_path/'a.html').write_text('<a href="b.html#there"></a><a href="b.html#gone"></a><a href="#gone"></a><img src="gone.png">')
    (tmp_path/'b.html').write_text('<h1 id="there"></h1><a href="a.html"></a>')
    assert [l for _, l in dead_links(tmp_path)]==['#gone', 'b.html#gone', 'gone.png']
