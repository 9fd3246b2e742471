"How the docs site shows a function: signature, docstring with its examples as code, parameters as a table"
import inspect
import re

from fastcore.docments import docments
from nbdev.showdoc import BasicMarkdownRenderer

EMPTY = inspect.Parameter.empty
EXAMPLE = re.compile(r'(?:^>>> .*$(?:\n^\.\.\. .*$)*\n?)+', re.M)


def fenced(docs: str) -> str:
    "Return a docstring whose `>>>` examples are blocks of code"
    code = lambda m: '\n```python\n' + re.sub(r'^(?:>>>|\.\.\.) ', '', m[0].rstrip(), flags=re.M) + '\n```\n'
    return EXAMPLE.sub(code, docs).strip()


def plain(value) -> str:
    "Return a default or a type without module paths and addresses"
    text = inspect.formatannotation(value) if isinstance(value, type) or hasattr(value, '__origin__') else repr(value)
    return re.sub(r'<[^<>]*?(\w+)(?: at 0x\w+)?>', r'\1', re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Z])', '', text))


def call(name: str, signature: inspect.Signature) -> str:
    "Return a call with the names of its parameters and their defaults"
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    parameters = [p for p in signature.parameters.values() if p.name not in ('self', 'cls')]
    value = lambda p: '' if p.default is EMPTY else f'={plain(p.default)}'
    words = [stars.get(p.kind, '') + p.name + value(p) for p in parameters]
    line = f"{name}({', '.join(words)})"
    return line if len(line) < 90 else f'{name}(\n    ' + ',\n    '.join(words) + ')'


def meanings(symbol) -> dict:
    "Return parameter -> its comment; fastcore gives the comment of `**kwargs` to the returned value"
    found = {k: o['docment'] for k, o in docments(symbol, full=True).items() if o.get('docment')}
    try:
        last = re.search(r'^\s*\*\*(\w+),?[ \t]*#[ \t]*(.+)$', inspect.getsource(symbol), re.M)
    except (OSError, TypeError):
        last = None
    if last and found.get('return') == last[2].strip():
        found[last[1]] = found.pop('return')
    return found


def table(symbol, signature: inspect.Signature) -> str:
    "Return parameters, their types and meanings as a Markdown table; nothing where no parameter is explained"
    found = meanings(symbol)
    safe = lambda text: re.sub(r'([|*])', r'\\\1', str(text)).replace('<', '&lt;').replace('\n', ' ')
    shown = lambda kind: '' if kind is EMPTY else f' `{plain(kind)}`'
    rows = [(p.name + shown(p.annotation), found.get(p.name, ''))
            for p in signature.parameters.values() if p.name not in ('self', 'cls')]
    if found.get('return') and not inspect.isclass(symbol):
        rows.append((f'returns{shown(signature.return_annotation)}', found['return']))
    if not any(row[1] for row in rows):
        return ''
    lines = ['| parameter | meaning |', '| --- | --- |', *(f'| {safe(name)} | {safe(text)} |' for name, text in rows)]
    return '\n'.join(lines)


class SignatureTable(BasicMarkdownRenderer):
    "Markdown of one symbol for `show_doc`"
    def _repr_markdown_(self):
        parts = [super()._repr_markdown_().partition('```python\n')[0].rstrip()]
        if self.sig is not None:
            parts.append(f'```python\n{call(self.nm, self.sig)}\n```')
        if self.docs:
            first, _, rest = self.docs.partition('\n')
            parts += [f'*{first.strip()}*', fenced(rest)]
        if self.sig is not None:
            parts.append(table(self.sym, self.sig))
        return '\n\n'.join(p for p in parts if p) + '\n'
