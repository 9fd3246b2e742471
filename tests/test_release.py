"What a release needs: metadata, licences, addresses from one place, workflows that can publish, and a container file"
import importlib.util
import json
import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).resolve().parents[1]
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']


def tool(name):
    spec = importlib.util.spec_from_file_location(name, root/'tools'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def metadata():
    "What setup.py tells setuptools"
    found = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(setuptools, 'setup', lambda **kwargs: found.update(kwargs))
        spec = importlib.util.spec_from_file_location('setup_of_the_project', root/'setup.py')
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return found


def test_licences_are_in_the_wheel(metadata):
    assert all((root/name).is_file() for name in metadata['license_files'])
    bundled = {p.relative_to(root).as_posix() for p in root.glob('kronos_nb/**/LICENSE*')}
    assert bundled <= set(metadata['license_files'])


def test_addresses_come_from_settings(metadata):
    ours = (cfg['git_url'], cfg['doc_host'])
    assert all(o.startswith(ours) for o in [metadata['url'], *metadata['project_urls'].values()])
    assert not tool('addresses').stale()


def test_another_owner_reaches_every_page():
    addresses = tool('addresses')
    who = 'somebody'   # not in one piece, or this file would show another address
    text = (f'https://github.com/{who}/kronos_nb/blob/x https://{who}.github.io/kronos_nb/api '
            f'colab.research.google.com/github/{who}/kronos_nb/blob https://github.com/{who}/kronos_nb_data')
    new = addresses.rewritten(text)
    assert new.count('somebody') == 1 and new.endswith('somebody/kronos_nb_data')


def test_the_long_description_works_elsewhere(metadata):
    text = metadata['long_description']
    targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert targets and all(o.startswith(('https://', '#')) for o in targets)
    for o in targets:   # every link into the repository leads to a file
        if m := re.match(rf"{re.escape(cfg['git_url'])}/(?:blob|raw)/{cfg['branch']}/([^#]+)", o):
            assert (root/m[1]).exists(), o


def test_pythons_and_classifiers(metadata):
    assert len(set(metadata['classifiers'])) == len(metadata['classifiers'])
    named = {o.rpartition(' ')[2] for o in metadata['classifiers'] if re.search(r':: 3\.\d+$', o)}
    for name, job in (('ci.yml', 'platforms'), ('release.yml', 'install')):
        workflow = yaml.safe_load((root/'.github'/'workflows'/name).read_text())
        tested = workflow['jobs'][job]['strategy']['matrix']['python']
        assert set(tested) <= named and cfg['min_python'] in tested


def test_the_release_is_checked_and_trusted():
    jobs = yaml.safe_load((root/'.github'/'workflows'/'release.yml').read_text())['jobs']
    assert jobs['publish']['permissions'] == {'id-token': 'write', 'attestations': 'write'}
    assert jobs['announce']['permissions'] == {'contents': 'write'} and jobs['announce']['needs'] == 'publish'
    assert jobs['publish']['needs'] == 'install' and jobs['install']['needs'] == 'build'
    text = (root/'.github'/'workflows'/'release.yml').read_text()
    assert 'password' not in re.sub('#.*', '', text) and 'secrets.' not in text


ACTIONS = {   # the first version that runs on Node 24: GitHub took Node 20 off its runners in September 2026
    'actions/checkout': 5, 'actions/setup-python': 6, 'actions/upload-artifact': 6, 'actions/download-artifact': 7,
    'actions/upload-pages-artifact': 5, 'actions/deploy-pages': 5, 'actions/attest': 3,
    'quarto-dev/quarto-actions/setup': 2, 'pypa/gh-action-pypi-publish': None}   # a composite, and a container


@pytest.mark.parametrize('name', ['ci.yml', 'release.yml'])
def test_actions_run_where_runners_are(name):
    jobs = yaml.safe_load((root/'.github'/'workflows'/name).read_text())['jobs']
    for used in (step['uses'] for job in jobs.values() for step in job['steps'] if 'uses' in step):
        action, _, at = used.partition('@')
        least = ACTIONS[action]
        assert at == 'release/v1' if least is None else int(at.removeprefix('v')) >= least, used


def test_a_tag_agrees_with_the_version(tmp_path, monkeypatch):
    release, names = tool('release'), ['settings.ini', 'CITATION.cff', 'CHANGELOG.md', 'kronos_nb/__init__.py']
    for name in names:
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text((root/name).read_text(encoding='utf-8'), encoding='utf-8')
    monkeypatch.setattr(release, 'root', tmp_path)
    assert release.changes(cfg['version']) and release.changes('99.0.0') == ''
    assert release.problems('v99') and release.problems(cfg['version'])
    kept = release.changes('Unreleased')
    for old in (cfg['version'], '99'):   # there already, or no version
        with pytest.raises(SystemExit):
            release.prepare(old)
    release.prepare('98.7.6')
    assert not release.problems('v98.7.6') and release.changes('98.7.6') == kept and not release.changes('Unreleased')
    changelog = tmp_path/'CHANGELOG.md'
    changelog.write_text(changelog.read_text().replace('## Unreleased\n', '## Unreleased\n\n- Something.\n'))
    assert release.problems('v98.7.6')   # what no version names would be in the wheel all the same


def test_the_version_is_everywhere_the_same():
    assert f"version: {cfg['version']}\n" in (root/'CITATION.cff').read_text()


def test_extras_are_in_dev_and_locked():
    def plain(words): return {re.split('[=<>]', o)[0].lower().replace('_', '-') for o in words}
    def names(key): return plain(shlex.split(cfg[key]))
    locked = plain((root/'constraints.txt').read_text().split('\n'))
    for key in ('serve_requirements', 'studio_requirements', 'requirements'):
        assert names(key) <= locked
    assert names('serve_requirements') <= names('dev_requirements')


def test_one_version_is_locked_for_every_python():
    lines = [o for o in (root/'constraints.txt').read_text().split('\n') if o and not o.startswith('#')]
    locked = [Requirement(o) for o in lines]
    for python in ('3.10', '3.11', '3.12', '3.13'):
        here = dict(python_version=python, python_full_version=f'{python}.0', sys_platform='linux')
        valid = [o.name for o in locked if o.marker is None or o.marker.evaluate(here)]
        assert {'numpy', 'pandas', 'scipy', 'torch'} <= set(valid)
        assert not [o for o in locked if o.specifier.prereleases or len(o.specifier) != 1]
        assert len(valid) == len({canonicalize_name(o) for o in valid})


INSTRUCTIONS = set('FROM ARG RUN COPY USER WORKDIR ENV EXPOSE VOLUME STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD'.split())


def test_the_container_file():
    "What a linter asks: known instructions, files that are there, versions, no root, JSON commands"
    text = re.sub(r'\\\n\s*', '', (root/'Containerfile').read_text())
    lines = [line.split(None, 1) for line in text.split('\n') if line and not line.startswith('#')]
    assert {name for name, _ in lines} <= INSTRUCTIONS and lines[0][0] == 'FROM'
    images = [rest.split()[0] for name, rest in lines if name == 'FROM']
    assert all(re.search(r':\d[\w.-]+$', o) for o in images)   # a version, not the latest
    for name, rest in lines:
        if name == 'COPY' and '--from' not in rest:
            assert all((root/o).exists() for o in rest.split()[:-1]), rest
        if name in ('ENTRYPOINT', 'CMD'):
            assert isinstance(json.loads(rest), list)
        assert not re.search(r'\b(sudo|apt-get upgrade|curl .*\| *sh)\b', rest)
    users = [rest for name, rest in lines if name == 'USER']
    assert users and users[-1] != 'root'
    entry = json.loads(next(rest for name, rest in lines if name == 'ENTRYPOINT'))
    from kronos_nb.cli import parser
    assert parser().parse_args([*entry[1:], '--model', 'bundled']).ip == '0.0.0.0'
