"""Reads a bash script for the commands that it would start. Nothing is executed: no command, no substitution."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")
_REDIRECTION = re.compile(r"&?\d?(?:>>|>\||>|<)(?:&\d|&-|[ \t]*[^\s;&|<>()]+)")
_HEREDOC = re.compile(r"<<-?[ \t]*(['\"]?)(\w+)\1")
_OPERATORS = ("&&", "||", ";;", "\n", ";", "&", "|", "(", ")")
_DEEPEST = 8  # scripts in scripts: eval, bash -c


@dataclass
class Array:
    """`NAME=( ... )`, with its words as they are written."""

    name: str
    is_more: bool
    words: list[str]


@dataclass
class Script:
    """What a script would start.

    Attributes:
        commands: each as its words, variables expanded.
        loops: variables that a loop gives several values, of which the first was taken.
        open: texts that only running the script would tell: variables that it does not set, and substitutions.
    """

    commands: list[list[str]] = field(default_factory=list)
    loops: dict[str, list[str]] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    variables: dict[str, list[str]] = field(default_factory=dict)


def read_script(text: str) -> Script:
    """The commands of a script with its variables and arrays in their places; of a loop, those of its first round."""
    script = Script()
    _Reader(script).read(text, 0)
    return script


class _Reader:
    """Follows a script statement by statement. `branches` has, for each `if` around: whether one was taken, whether this one is."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.branches: list[tuple[bool, bool]] = []

    def read(self, text: str, depth: int) -> None:
        """Follow a text."""
        for statement in _statements(text):
            self._follow(statement, depth)

    def _follow(self, statement: list[str | Array], depth: int) -> None:
        while statement and statement[0] in ("then", "do", "{", "}", "!", "time", "(", ")"):
            statement = statement[1:]
        if not statement:
            return
        first = statement[0]
        if first in ("if", "elif", "else", "fi"):
            self._branch(first, statement[1:])
            if first == "else":
                self._follow(statement[1:], depth)
        elif not all(is_taken for _, is_taken in self.branches):
            return
        elif first == "for" and len(statement) > 2 and statement[2] == "in":
            self._loop(str(statement[1]), [word for word in statement[3:] if isinstance(word, str)])
        elif first in ("while", "until", "done", "case", "esac", "function", "[", "[["):
            return
        else:
            self._command(statement, depth)

    def _branch(self, word: str, condition: list[str | Array]) -> None:
        if word == "if":
            taken = self._holds(condition) is not False
            self.branches.append((taken and self._holds(condition) is True, taken))
        elif self.branches and word == "fi":
            self.branches.pop()
        elif self.branches:
            was_taken, _ = self.branches.pop()
            truth = True if word == "else" else self._holds(condition)
            self.branches.append((was_taken or truth is True, not was_taken and truth is not False))

    def _holds(self, condition: list[str | Array]) -> bool | None:
        """Whether `[ a = b ]` is true; None if it is not of the forms that are read here."""
        words = [each for word in condition if isinstance(word, str) for each in (self.expand(word) or [""])]
        if len(words) < 3 or words[0] not in ("[", "[[") or words[-1] not in ("]", "]]"):
            return None
        inner = words[1:-1]
        if any("$" in word for word in inner):
            return None
        if len(inner) == 2 and inner[0] in ("-z", "-n"):
            return (inner[1] == "") == (inner[0] == "-z")
        if len(inner) == 3 and inner[1] in ("=", "==", "-eq"):
            return inner[0] == inner[2]
        if len(inner) == 3 and inner[1] in ("!=", "-ne"):
            return inner[0] != inner[2]
        return None

    def _loop(self, name: str, words: list[str]) -> None:
        values = [each for word in words for each in self.expand(word)]
        if len(values) > 1:
            self.script.loops[name] = values
        self.script.variables[name] = values[:1]

    def _command(self, statement: list[str | Array], depth: int) -> None:
        if statement[0] in ("export", "local", "readonly", "declare", "typeset"):
            statement = [word for word in statement[1:] if isinstance(word, Array) or not word.startswith("-")]
        while statement and (isinstance(statement[0], Array) or _ASSIGNMENT.fullmatch(statement[0])):
            self._assign(statement[0])
            statement = statement[1:]
        words = [each for word in statement if isinstance(word, str) for each in self.expand(word)]
        if not words:
            return
        if words[0] == "eval" and depth < _DEEPEST:
            self.read(" ".join(words[1:]), depth + 1)
        elif words[0] in ("bash", "sh") and len(words) > 2 and words[1].startswith("-") and words[1].endswith("c"):
            if depth < _DEEPEST:
                self.read(words[2], depth + 1)
        else:
            self.script.commands.append(words)

    def _assign(self, word: str | Array) -> None:
        variables = self.script.variables
        if isinstance(word, Array):
            values = [each for raw in word.words for each in self.expand(raw)]
            variables[word.name] = (variables.get(word.name, []) if word.is_more else []) + values
        elif match := _ASSIGNMENT.fullmatch(word):
            value = " ".join(self.expand(match[3], is_split=False))
            before = " ".join(variables.get(match[1], [])) if match[2] else ""
            variables[match[1]] = [before + value]

    def expand(self, raw: str, is_split: bool = True) -> list[str]:
        """A word as it is written, as the words that bash would make of it."""
        fields: list[str] = []
        current: str | None = None
        position, is_quoted = 0, False
        while position < len(raw):
            letter = raw[position]
            if letter == "'" and not is_quoted:
                end = raw.find("'", position + 1)
                end = len(raw) if end < 0 else end
                current = (current or "") + raw[position + 1 : end]
                position = end + 1
            elif letter == '"':
                is_quoted = not is_quoted
                current = current or ""
                position += 1
            elif letter == "\\" and position + 1 < len(raw):
                follower = raw[position + 1]
                keeps = is_quoted and follower not in '"\\$`\n'
                current = (current or "") + ("" if follower == "\n" else ("\\" if keeps else "") + follower)
                position += 2
            elif letter in "$`":
                length, values, is_list = self._value(raw[position:])
                position += length
                if not is_quoted and is_split:
                    values = [part for value in values for part in value.split()]
                elif not is_list:
                    values = [" ".join(values)]
                if values:
                    fields += [(current or "") + values[0], *values[1:-1]] if len(values) > 1 else []
                    current = values[-1] if len(values) > 1 else (current or "") + values[0]
            else:
                current = (current or "") + letter
                position += 1
        return fields + ([current] if current is not None else [])

    def _value(self, raw: str) -> tuple[int, list[str], bool]:
        """What a `$...` stands for: its length as written, its values, and whether it is all of an array."""
        if raw.startswith(("$(", "`")):
            length = _closing(raw, 1) + 1 if raw.startswith("$(") else max(raw.find("`", 1), 1) + 1
            return length, [self._open(raw[:length])], False
        if raw.startswith("${"):
            length = _closing(raw, 1) + 1
            return length, *self._braced(raw[2 : length - 1], raw[:length])
        if match := _NAME.match(raw, 1):
            return match.end(), self._variable(match[0], match[0]), False
        if len(raw) > 1 and raw[1] in "@*#?$!0123456789":
            return 2, [], False  # arguments of the script itself
        return 1, ["$"], False

    def _braced(self, inner: str, raw: str) -> tuple[list[str], bool]:
        match = re.fullmatch(r"([A-Za-z_]\w*)(?:\[([@*]|\d+)\])?(?::?([-=])(.*))?", inner, re.DOTALL)
        if match is None:
            return ([], False) if re.fullmatch(r"[@*\d#]+(:?-.*)?", inner) else ([self._open(raw)], False)
        name, index, has_default, default = match.groups()
        values = self.script.variables.get(name)
        if values is None or (has_default and values in ([], [""])):
            return (self.expand(default, is_split=False) if has_default else [self._open(raw)]), False
        if index in ("@", "*"):
            return values, index == "@"
        position = int(index or 0)
        return values[position : position + 1], False

    def _variable(self, name: str, written: str) -> list[str]:
        values = self.script.variables.get(name)
        return values[:1] if values is not None else [self._open(f"${written}")]

    def _open(self, text: str) -> str:
        if text not in self.script.open:
            self.script.open.append(text)
        return text


def _closing(text: str, start: int) -> int:
    """Where the bracket at `start` is closed, or the last position of the text."""
    pairs = {"(": ")", "{": "}"}
    opening, closing, depth = text[start], pairs[text[start]], 0
    for position in range(start, len(text)):
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return position
    return len(text) - 1


def _statements(text: str) -> Iterator[list[str | Array]]:
    """A script's statements, each as its words as they are written, quotes and all."""
    statement: list[str | Array] = []
    for token in _tokens(text.replace("\r\n", "\n")):
        if isinstance(token, str) and token in _OPERATORS:
            yield statement
            statement = []
        else:
            statement.append(token)
    yield statement


def _tokens(text: str) -> Iterator[str | Array]:
    position, heredocs = 0, []
    while position < len(text):
        letter = text[position]
        if text.startswith("\\\n", position):
            position += 2
        elif letter in " \t":
            position += 1
        elif letter == "#":
            position = _line_end(text, position)
        elif match := _HEREDOC.match(text, position):
            heredocs.append(match[2])
            position = match.end()
        elif match := _REDIRECTION.match(text, position):
            position = match.end()
        elif operator := next((each for each in _OPERATORS if text.startswith(each, position)), None):
            yield operator
            position += len(operator)
            while operator == "\n" and heredocs:
                position = _behind_heredoc(text, position, heredocs.pop(0))
        else:
            end = _word_end(text, position)
            if text.startswith("(", end) and _ARRAY.fullmatch(text, position, end):
                name, closing = text[position : end - 1], _array_end(text, end + 1)
                words = [
                    token for token in _tokens(text[end + 1 : closing]) if isinstance(token, str) and token != "\n"
                ]
                yield Array(name.rstrip("+"), name.endswith("+"), words)
                position = closing + 1
            else:
                yield text[position:end]
                position = max(end, position + 1)


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _behind_heredoc(text: str, position: int, mark: str) -> int:
    while position < len(text):
        end = _line_end(text, position)
        line, position = text[position:end].strip(), end + 1
        if line == mark:
            break
    return position


def _word_end(text: str, position: int) -> int:
    """Where a word ends: at a space or an operator that is in no quotes and no `$(...)`."""
    while position < len(text):
        letter = text[position]
        if letter == "\\":
            position += 2
        elif letter == "'":
            position = _quote_end(text, position, "'")
        elif letter in '"`':
            position = _quote_end(text, position, letter)
        elif text.startswith(("$(", "${"), position):
            position = _closing(text, position + 1) + 1
        elif letter in " \t\n;&|()<>":
            return position
        else:
            position += 1
    return min(position, len(text))


def _quote_end(text: str, position: int, quote: str) -> int:
    """The position behind the closing quote, or the end of the text."""
    position += 1
    while position < len(text) and text[position] != quote:
        position += 2 if quote == '"' and text[position] == "\\" else 1
    return position + 1


def _array_end(text: str, position: int) -> int:
    """Where the bracket is closed that began an array; brackets in comments and quotes do not count."""
    while position < len(text) and text[position] != ")":
        if text[position] == "#" and text[position - 1] in " \t\n(":
            position = _line_end(text, position)
        elif text[position] in "'\"":
            position = _quote_end(text, position, text[position])
        elif text.startswith(("$(", "${"), position):
            position = _closing(text, position + 1) + 1
        else:
            position += 2 if text[position] == "\\" else 1
    return position
