"""README and docs against the code: quotes are verbatim, and what they name is there.

Commands are read by common.load itself, with the settings of the script that they call.
"""
import ast
import glob
import json
import os
import re
import shlex
import sys
from dataclasses import fields

import pytest
import yaml

import common
from model import MoMConfig

ROOT = common.ROOT


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def paths(*patterns):
    found = []
    for pattern in patterns:
        found += glob.glob(os.path.join(ROOT, pattern))
    return sorted(os.path.relpath(path, ROOT).replace(os.sep, '/') for path in found)


PAGES = ['README.md', *paths('docs/*.md')]
CODE = paths('*.py', 'config/*.py', 'tests/*.py')


def fences(page, language=r'\w*'):
    """The blocks of code of a page in that language."""
    return re.findall(rf'^```{language}\n(.*?)^```$', read(page), re.M | re.S)


def inline(page):
    """What stands between single backticks."""
    prose = re.sub(r'^```.*?^```$', '', read(page), flags=re.M | re.S)
    return re.findall(r'`([^`\n]+)`', prose)


def links(page):
    shown = re.sub(r'<!--.*?-->', '', read(page), flags=re.S)
    return re.findall(r'\]\(([^)\s]+)\)', shown)


# ----------------------------------------------------------------------------- what is there

def settings_of(script):
    """(its settings with their defaults, the keywords of its common.load), or None without one."""
    scope = {}
    for node in ast.parse(read(script)).body:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == 'common.load':
                keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
                return scope, keywords
        if not isinstance(node, ast.Assign):
            continue
        try:
            scope[node.targets[0].id] = ast.literal_eval(node.value)
        except (ValueError, AttributeError):
            pass  # not a setting: its value is computed


SCRIPTS = {script: settings_of(script) for script in paths('*.py') if settings_of(script)}
FIELDS = {field.name for field in fields(MoMConfig)}
SETTINGS = FIELDS.union(*(scope for scope, _ in SCRIPTS.values()))


def there(name):
    """Whether the project has it: '--setting', 'make target', or a path."""
    if name.startswith('--'):
        return name[2:] in SETTINGS
    if name.startswith('make '):
        return re.search(rf'^{name[5:]}:', read('Makefile'), re.M) is not None
    places = [os.path.join(ROOT, folder, name) for folder in ('', 'config', 'tests')]
    return any(map(os.path.exists, places))


def load(script, arguments):
    """The settings that the script gets from these arguments. Raises ValueError as it would."""
    scope, keywords = SCRIPTS[script]
    model = {'model': MoMConfig} if 'model' in keywords else {}
    without = ast.literal_eval(keywords.get('without', '()'))
    return common.load(dict(scope), arguments, **model, without=without)[0]


def commands(page):
    """The commands of a page, each a list of words."""
    blocks = fences(page, 'sh') + [code for code in inline(page) if '--' in code or '.py' in code]
    for block in blocks:
        for line in block.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if words and there('config/' + words[0]):  # train.py goes without saying
                words = ['train.py', 'config/' + words[0], *words[1:]]
            if words:
                yield words


# ----------------------------------------------------------------------------- tests

def test_each_quote_of_method_stands_in_model():
    source = read('model.py')
    quotes = fences('docs/method.md', 'python')
    assert quotes
    for quote in quotes:
        assert quote in source, f'not in model.py:\n{quote}'


def test_method_has_every_equation_with_a_formula():
    text = read('docs/method.md')
    for number in range(1, 12):
        _, *section = re.split(rf'^\*\*Eq\. {number}\b', text, flags=re.M)
        assert len(section) == 1, number
        assert '```math' in section[0].split('\n**')[0], number


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        assert there(target), link
        if anchor:
            headings = re.findall(r'^#+ (.*)$', read(target), re.M)
            plain = [re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings]
            known = [heading.replace(' ', '-') for heading in plain]
            assert anchor in known, link


@pytest.mark.parametrize('page', PAGES)
def test_files_and_make_targets_exist(page):
    named = set()
    for code in fences(page) + inline(page):
        named.update(re.findall(r'(?<![\w./])[\w./-]*\w\.py\b', code))
        named.update(re.findall(r'\bmake [a-z]+', code))
        named.update(re.findall(r'(?<!\S)(?:docs|tests|config)/[\w./-]*\w', code))
    missing = {name for name in named if not there(name)}
    assert not missing, f'{page} names {missing}'


def test_each_test_that_docs_name_is_there():
    there = re.findall(r'def (test_\w+)', '\n'.join(map(read, paths('tests/*.py'))))
    named = {name for page in PAGES for name in re.findall(r'`(test_\w+)…?`', read(page))}
    assert named
    assert not [name for name in named if not any(one.startswith(name) for one in there)]


@pytest.mark.parametrize('page', PAGES)
def test_names_in_prose_stand_in_the_code(page):
    code = '\n'.join(map(read, CODE + ['Makefile', 'requirements.txt', 'requirements-dev.txt']))
    words = set(re.findall(r'\w+', code))
    for name in inline(page):
        if re.match(r'[A-Z_]{4,}\b', name):  # a variable of the shell
            continue
        if re.fullmatch(r'[A-Za-z_][\w.]*', name) and not name.endswith('.md'):
            unknown = [part for part in name.split('.') if part not in words]
            assert not unknown, f'{page}: {name}'
        setting = re.fullmatch(r'([A-Za-z_]\w*)=\S+', name)
        assert not setting or setting[1] in SETTINGS, f'{page}: {name}'


@pytest.mark.parametrize('page', PAGES)
def test_commands_are_understood(page, monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # common.load sets its own
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        script = next((word for word in words if word in SCRIPTS), None)
        after = words[words.index(script) + 1:] if script else words
        if words[0] == 'torchrun' and not script:  # its own settings, in prose
            continue
        keys = [word.partition('=')[0] for word in after if word.startswith('--')]
        for key in keys:
            assert there(key) or key == '--help', f'{page}: {" ".join(words)}'
        if script:
            known = [word for word in after if there(word.partition('=')[0])]
            if script == 'bench.py':  # its mode comes first; of a config it takes the model alone
                known = after[:1] + [word for word in known if word.startswith('--')]
            settings = load(script, known)
            if script == 'train.py':
                MoMConfig(**{key: settings[key] for key in FIELDS & set(settings)})


def test_python_of_readme_sets_fields_that_there_are():
    keywords = set()
    for block in fences('README.md', 'python'):
        for call in ast.walk(ast.parse(block)):
            named = isinstance(call, ast.Call) and ast.unparse(call.func)
            if named in ('MoMConfig', 'GPT.from_pretrained'):
                keywords.update(keyword.arg for keyword in call.keywords)
    assert keywords and keywords <= FIELDS


def test_citation_file_names_the_paper_of_readme():
    citation = yaml.safe_load(read('CITATION.cff'))
    assert {'cff-version', 'message', 'title', 'authors', 'version', 'license'} <= set(citation)
    paper = citation['preferred-citation']
    names = [f'{author["family-names"]}, {author["given-names"]}' for author in paper['authors']]
    bibtex = re.sub(r'\s+', ' ', fences('README.md', 'bibtex')[0])
    assert ' and '.join(names) in bibtex
    assert paper['title'] in bibtex and paper['journal'] in bibtex and str(paper['year']) in bibtex


def test_kept_results_are_of_the_text_that_docs_name():
    kept = [path for path in paths('docs/data/*/*.json') if not path.endswith('results.json')]
    sums = {json.loads(read(path))['train_sha256'] for path in kept}
    assert len(kept) > 100 and len(sums) == 1
    assert f'begins with {sums.pop()[:8]},' in read('docs/results.md')
