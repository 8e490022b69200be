"""Chat templates that would take memory, time or control if they could, by what they try."""

S = "{% set s = 'a' * 1000000 %}"  # a text of a megabyte
NS = "{% set ns = namespace(x=1, l=[]) %}"


def loop(body: str, passes: int = 99999) -> str:
    """Return a template that runs `body` many times."""
    return NS + "{% for i in range(" + str(passes) + ") %}" + body + "{% endfor %}"


DOUBLE = "{% set ns.x = [ns.x, ns.x] %}"

# Each is refused.
REFUSED: dict[str, str] = {
    # out of the sandbox
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['json'].loads('1') }}",
    "attr filter": "{{ (messages | attr('__class__'))() }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a mapping": "{{ messages[0].update(a=1) }}",
    "mutation by item": "{{ messages['clear']() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '/etc/passwd' %}",
    "namespace attribute": "{{ namespace(__class__=1) }}",
    "namespace assignment": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "class of a namespace": "{{ namespace.mro() }}",
    "budget from a macro": "{% macro f() %}{% endmacro %}{{ f._environment.filters() }}",
    "budget refilled": "{{ [-10**300] | map('paid nodes') | list }}" + loop("{{ i }}" * 400),
    # numbers
    "squares": loop("{% set ns.x = (ns.x + 1) * (ns.x + 1) %}"),
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "power of one step": "{{ 2 ** 100000 }}",
    "float of a power": "{{ 10.0 ** 1000000 }}",
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "round down": "{{ 5 | round(-1000000000) }}",
    "int of a long text": "{{ ('9' * 1000000) | int }}",
    "int of hexadecimal": "{{ ('f' * 4000) | int(0, 16) }}",
    "bytes to a number": "{{ (1).from_bytes(('a' * 100000).encode(), 'big') }}",
    "number to bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "sum of numbers": loop("{% set ns.x = [ns.x, ns.x, 1] | sum %}"),
    "literal": "{{ " + "9" * 5000 + " }}",
    "hexadecimal literal": "{{ 0x" + "f" * 5000 + " }}",
    "odd text": "{{ '%999999999d' is odd }}",
    "divisible text": "{{ '%999999999d' is divisibleby(3) }}",
    # texts
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition from the left": "{{ 10**8 * 2 * 'a' }}",
    "repetition of markup": "{{ ('<' | safe) * 10**9 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent mapping": S + "{{ ('%(a)s' * 1000) % {'a': s} }}",
    "percent markup": S + "{{ (('%s' * 200) | safe) % ((s,) * 200) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:999999999}'.format(1) }}",
    "format method, nested width": "{{ '{:{}}'.format(1, 999999999) }}",
    "format method, many fields": S + "{{ ('{0}' * 1000).format(s) }}",
    "format method, quoted": S + "{{ ('{0!r}' * 100).format(s) }}",
    "center": "{{ 'a' | center(10**9) }}",
    "center method": "{{ 'a'.center(999999999) }}",
    "method by item": "{{ 'a'['center'](999999999) }}",
    "method by attr": "{{ ('a' | attr('center'))(999999999) }}",
    "method kept": "{% set f = 'a'.ljust %}{{ f(999999999) }}",
    "bytes method": "{{ 'a'.encode().rjust(999999999) }}",
    "zfill": "{{ 'a'.zfill(999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(999999999) }}",
    "indent": "{{ 'a\n' | indent(999999999, true, true) }}",
    "indent by text": S + "{{ ('a\n' * 1000) | indent(s) }}",
    "wordwrap": S + "{{ s | wordwrap(1, true, s) }}",
    "truncate": S + loop("{% set ns.l = [s | truncate(999998, true, s[:9]), ns.l] %}"),
    "replace method": S + "{{ s.replace('a', s) }}",
    "replace filter": S + "{{ s | replace('a', s) }}",
    "replace nothing": S + "{{ s.replace('', s) }}",
    "join method": S + "{{ s.join(range(10000) | map('string')) }}",
    "join filter": S + "{{ range(10000) | join(s) }}",
    "join of the same": S + "{{ ([s] * 1000) | join }}",
    "join by attribute": S + "{{ ([{'a': s}] * 1000) | join(attribute='a') }}",
    "translate": S + "{{ s.translate({97: s}) }}",
    "maketrans": loop("{% set ns.l = [ns.l, ''.maketrans('abc' * 9999, 'abd' * 9999)] %}"),
    "escape again and again": "{% set ns = namespace(x='<') %}"
    "{% for i in range(99) %}{% set ns.x = ns.x | forceescape ~ ns.x %}{% endfor %}",
    "markup and text": "{% set ns = namespace(x='&' | safe) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x + ns.x | string %}{% endfor %}",
    "autoescape": S + "{% autoescape true %}{% for i in range(99) %}{{ s.replace('a', '<') }}"
    "{% endfor %}{% endautoescape %}",
    "autoescape, joined": S + "{% autoescape true %}{{ ([s.replace('a', '<')] * 99) | join('<') }}"
    "{% endautoescape %}",
    "urlencode": loop("{% set ns.l = [ns.l, ('\u00e4' * 9000) | urlencode] %}"),
    "urlencode of much": S + "{{ s | urlencode }}",
    "striptags": "{{ ('<!---->' * 100000) | striptags }}",
    "striptags method": "{{ (('<!---->' * 100000) | safe).striptags() }}",
    "urlize": "{{ ('www.a.' * 100000) | urlize }}",
    "pprint": "{{ (range(100000) | list) | pprint }}",
    "xmlattr": S + "{{ {'a': s} | xmlattr }}",
    "split": S + loop("{% set ns.l = [ns.l, s.split('a')] %}"),
    "split at spaces": loop("{% set ns.l = [ns.l, ('a ' * 100000).split()] %}"),
    "splitlines": loop("{% set ns.l = [ns.l, ('\n' * 100000).splitlines()] %}"),
    "list of letters": S + loop("{% set ns.l = [ns.l, s | list] %}"),
    "upper": S + loop("{% set ns.l = [ns.l, s | upper] %}"),
    "rfind": "{% set s = 'a' * 4000000 %}{{ s.rfind('b' ~ s[:2000000]) }}",
    "rsplit": "{% set s = 'a' * 4000000 %}{{ s.rsplit('b' ~ s[:2000000]) }}",
    "strip of many characters": S + "{{ s.strip(s) }}",
    "codec": "{{ 'a'.encode('idna') }}",
    "codec, errors": "{{ ('\u00e4' * 1000).encode('ascii', 'namereplace') }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "lipsum, long": "{{ lipsum(n=1, min=10**8, max=10**9) }}",
    "date": "{{ strftime_now('%Y' * 10**6) }}",
    "date width": "{{ strftime_now('%Y' * 60) }}",
    # containers
    "long range": "{{ range(10**9) | list }}",
    "repetition of a list": "{{ [0] * 10**9 }}",
    "repetition of a nested list": "{{ ([range(1000) | list] * 10**6) }}",
    "nested list printed": loop(DOUBLE, 40) + "{{ ns.x }}",
    "nested tuple printed": loop("{% set ns.x = (ns.x, ns.x) %}", 40) + "{{ ns.x }}",
    "nested mapping printed": loop("{% set ns.x = {'a': ns.x, 'b': ns.x} %}", 40) + "{{ ns.x }}",
    "nested list as JSON": loop(DOUBLE, 40) + "{{ ns.x | tojson }}",
    "nested list joined": loop(DOUBLE, 40) + "{{ [ns.x] | join }}",
    "nested list upper": loop(DOUBLE, 40) + "{{ ns.x | upper }}",
    "nested list is upper": loop(DOUBLE, 40) + "{{ ns.x is upper }}",
    "nested list in text": loop(DOUBLE, 40) + "{{ ns.x ~ '' }}",
    "nested list formatted": loop(DOUBLE, 40) + "{{ '%s' % (ns.x,) }}",
    "nested list pprinted": loop(DOUBLE, 40) + "{{ ns.x | pprint }}",
    "nested tuple hashed": loop("{% set ns.x = (ns.x, ns.x) %}", 40) + "{{ {ns.x: 1} }}",
    "nested lists compared": NS
    + "{% set m = namespace(x=1) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set m.x = [m.x, m.x] %}{% endfor %}{{ ns.x == m.x }}",
    "nested arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
    "{{ varargs }}{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "deep list": loop("{% set ns.x = [ns.x] %}"),
    "deep tuple hashed": loop("{% set ns.x = (ns.x,) %}") + "{{ {ns.x: 1} }}",
    "deep iterators": loop("{% set ns.x = [ns.x] | map('list') %}"),
    "slices kept": S + loop("{% set ns.l = [s[1:], ns.l] %}"),
    "slices in one list": S + loop("{% set ns.l = ns.l + [s[i:]] %}"),
    "doubling by plus": "{% set a = 'aa' %}" + "{% set a = a + a %}" * 40,
    "doubling by tilde": "{% set a = 'aa' %}" + "{% set a = a ~ a %}" * 40,
    "doubling by output": "{% set a = 'aa' %}"
    + "{% set b %}{{ a }}{{ a }}{% endset %}{% set a = b %}" * 40,
    "doubling by a filter block": NS
    + "{% set ns.x = 'aa' %}"
    + "{% set ns.x %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}" * 40,
    "doubling of a list": "{% set a = [1] %}" + "{% set a = a + a %}" * 40,
    "doubling by sum": "{% set a = [1] %}" + "{% set a = [a, a] | sum(start=[]) %}" * 40,
    "sum of lists": "{{ ([range(1000) | list] * 10000) | sum(start=[]) | length }}",
    "sort": loop("{% set ns.l = [messages, range(100000) | sort(reverse=true)] %}"),
    "sort by a long path": "{{ ([{}] * 10000) | sort(attribute='a.' * 10000) }}",
    "sort of long texts": NS
    + "{% for i in range(99) %}{% set ns.l = ns.l + [['b' * 900000, i]] %}{% endfor %}"
    + "{% for i in range(999) %}{% set x = ns.l | sort %}{% endfor %}",
    "sort of equal texts in namespaces": NS
    + "{% for i in range(99) %}{% set m = namespace(y='b' * 900000) %}"
    "{% set ns.l = ns.l + [m] %}{% endfor %}"
    "{% for i in range(9999) %}{% set x = ns.l | sort(attribute='y') %}{% endfor %}",
    "min": loop("{% set x = range(100000) | min %}"),
    "equal hashes": "{% set p = 2**61 - 1 %}{{ range(0, 99999 * p, p) | unique | list | length }}",
    "equal hashes of tuples": NS
    + "{% set ns.l = [()] %}{% for i in range(16) %}{% set ns.x = ns.l %}{% set ns.l = [] %}"
    "{% for t in ns.x %}{% set ns.l = ns.l + [t + (-1,), t + (-2,)] %}{% endfor %}{% endfor %}"
    "{{ dict.fromkeys(ns.l) | length }}",
    "fromkeys": loop("{% set ns.l = [ns.l, {}.fromkeys(range(999))] %}"),
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "slice filled": loop("{% set ns.l = [ns.l, range(9999) | slice(9999, 1) | list] %}"),
    "JSON indent": "{{ [1] | tojson(indent=999999999) }}",
    "JSON separators": S + "{{ range(1000) | list | tojson(separators=(s, s)) }}",
    "JSON escapes": "{% set s = '\u00e4' * 9000000 %}{{ s | tojson(ensure_ascii=true) }}",
    "spread": "{% macro f() %}{{ varargs | length }}{% endmacro %}{{ f(*('a' * 60000000)) }}",
    "membership": loop("{% if i in ns.l %}{% endif %}{% if 'a' in range(100000) %}{% endif %}"),
    "membership of texts": S
    + NS
    + "{% for i in range(60) %}{% set ns.l = ns.l + [s ~ i] %}{% endfor %}"
    "{% for i in range(9999) %}{% if s ~ 99 in ns.l %}{% endif %}{% endfor %}",
    "comparison of texts": S
    + "{% set t = s ~ 1 %}{% set u = s ~ 1 %}"
    + "{% for i in range(99999) %}{% if t == u %}{% endif %}{% endfor %}",
    "comparison by a test": S
    + "{% set t = s ~ 1 %}{% set u = s ~ 1 %}"
    + "{% for i in range(99999) %}{% if t is eq(u) %}{% endif %}{% endfor %}",
    "search": S
    + "{% for i in range(99999) %}{% if 'ab' in s %}{% endif %}{{ s.find('ab') }}{% endfor %}",
    "selection": "{% set l = range(100000) | list %}"
    + "{% for i in range(999) %}{% set x = l | select('in', l) | list %}{% endfor %}",
    "loop.changed": "{% set l = range(100000) | list %}{% set k = range(100000) | list %}"
    "{% for i in range(99999) %}{% if loop.changed([l, k][i % 2]) %}{% endif %}{% endfor %}",
    # running on
    "much output": S + "{% for i in range(9999) %}{{ s }}{% endfor %}",
    "much constant output": "{% for i in range(99999) %}" + "a" * 60000 + "{% endfor %}",
    "nested empty loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loop over an iterator": "{% for a in range(9999) %}"
    "{% for b in range(9999) | map('abs') %}{% endfor %}{% endfor %}",
    "nothing but branches": "{% for a in range(99999) %}"
    + "{% if a %}{% endif %}" * 3000
    + "{% endfor %}",
    "tests in a loop": "{% for a in range(99999) if "
    + " and ".join(["a > 0"] * 90)
    + " and false %}{% endfor %}",
    "recursive loop": "{% for a in [range(99)] recursive %}{{ loop(a if a is iterable else "
    "[range(99)]) }}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}"
    "{% endif %}{% endmacro %}{{ f(40) }}",
    "defaults of a macro": "{% macro f(a=range(99999) | list) %}{% endmacro %}"
    "{% for i in range(99999) %}{{ f() }}{% endfor %}",
    "endless block": "{% block a %}{{ self.a() }}{% endblock %}",
    "branching caller": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{{ caller() }}{{ caller() }}"
    "{% endcall %}{% endif %}a{% endmacro %}{% call f(40) %}{% endcall %}{{ nothing() }}",
    "cycler": loop("{% set ns.l = [ns.l, cycler(*range(9999))] %}"),
    "joiner": S + "{% set j = joiner(s) %}{% for i in range(999) %}{{ j() }}{% endfor %}",
    "undefined call": "{{ nothing() }}",
    "division by zero": "{{ 1 / 0 }}",
    "not JSON": "{{ namespace() | tojson }}",
    # compiling
    "parentheses": "{{" + "(" * 5000,
    "attributes": "{{ a" + ".b" * 20000 + " }}",
    "filters": "{{ a" + "|e" * 20000 + " }}",
    "sums": "{{ a" + "+a" * 20000 + " }}",
    "negations": "{{ " + "-" * 50000 + "1 }}",
    "nested loops": "{% for a in b %}" * 99 + "{% endfor %}" * 99,
    "nested branches": "{% if a %}" * 500 + "{% endif %}" * 500,
    "many nodes": "{{a|e|e}}" * 7200,
    "large": "a" * 70000,
}
