"""Grammars of strangers: what would keep llama.cpp busy for ever is refused before a text comes to it; no other is."""

from __future__ import annotations

import pytest

from pi_gguf.errors import OptionError
from pi_gguf.llamacpp.grammars import GRAMMAR, check_grammar

DOUBLED = "".join(f"r{n} ::= r{n + 1} r{n + 1}\n" for n in range(30)) + 'r30 ::= "x"?\n'

ENDLESS = {
    "left recursion behind what may be nothing": 'root ::= "a" x\nx ::= y x "c" | "d"\ny ::= z\nz ::= "" | "b"',
    "inside a group": 'root ::= "a" ("b" (x | "e"))*\nx ::= y x "c" | "d"\ny ::= z\nz ::= "" | "b"',
    "behind a token": 'root ::= <"> x\nx ::= y x "c" | "d"\ny ::= z\nz ::= "" | "b" # "',
    "behind a class": 'root ::= [#"\\]] x\nx ::= y x [^"] | "d"\ny ::= z\nz ::= "" | [\\]]',
    "each rule twice the next": f'root ::= "a" r0\n{DOUBLED}',
    "the same, never begun with": f'root ::= "a" "b"* r9 r9\n{DOUBLED}',
}


@pytest.mark.parametrize("grammar", ENDLESS.values(), ids=ENDLESS)
def test_a_grammar_that_never_ends_later_on_is_refused(grammar):
    with pytest.raises(OptionError, match="a place in it at which too much may come"):
        check_grammar(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        """# JSON
root   ::= object
value  ::= object | array | string | ("true" | "false" | "null") ws # any of them

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::=
  "\\"" (
    [^"\\\\\\x7F\\x00-\\x1F] |
    "\\\\" (["\\\\bfnrt] | "u" [0-9a-fA-F]{4}) # an escape
  )* "\\"" ws
ws ::= | " " | "\\n" [ \\t]{0,20}
""",
        'root ::= "a"* [b-d]+ .? "e"{2} ("f" | g){2,} (g){0,3} ("(" root ")")*\ng ::= "h"?  "place0-0"',
        'root ::= ("a" | "b"?)+ ("c"* "d"*)? ([0-9]){0,3000} "e"{3000,3000}'.replace("{3000,3000}", "{30,3000}"),
        "root ::= " + " n" * 40 + '\nn ::= "" | "y"?',
        "root ::= r0\n" + "".join(f'r{n} ::= "a" r{n + 1}\n' for n in range(1500)) + 'r1500 ::= "x"?',
        "root ::= <[7]>{2} !<[3]>* <a>",
        'root ::= "a\n\nb ::= c" [\n]',
    ],
    ids=range(7),
)
def test_other_grammars_pass(grammar):
    check_grammar(grammar)


def test_a_grammar_has_a_length():
    check_grammar('root ::= "' + "a" * (GRAMMAR - 11) + '"')
    with pytest.raises(OptionError, match="at most 65,536 characters, got 65,537"):
        check_grammar('root ::= "' + "a" * (GRAMMAR - 10) + '"')
