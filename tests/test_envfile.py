"""ops/envfile.py: a file of settings, as systemd reads an EnvironmentFile (systemd.exec(5))."""

import pytest

from ops.envfile import variables

FILES = {
    "nothing": ("", {}),
    "a variable": ("A=1\n", {"A": "1"}),
    "without a line break at the end": ("A=1", {"A": "1"}),
    "several": ("A=1\nB=2\n", {"A": "1", "B": "2"}),
    "the last one counts": ("A=1\nA=2\n", {"A": "2"}),
    "empty lines and comments": ("\n# A=1\n; B=2\n  # C=3\nD=4\n", {"D": "4"}),
    "an empty value": ("A=\n", {"A": ""}),
    "spaces around": ("  A =  x y  \n", {"A": "x y"}),
    "Windows' line ends": ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
    "in double quotes": ('A="x y "\n', {"A": "x y "}),
    "in single quotes": ("A='x y '\n", {"A": "x y "}),
    "an empty value in quotes": ("A=\"\"\nB=''\n", {"A": "", "B": ""}),
    "other quotes within": ('A="it\'s"\nB=\'say "x"\'\n', {"A": "it's", "B": 'say "x"'}),
    "one quote": ('A="', {"A": ""}),
    "a quote that does not end": ('A="x', {"A": "x"}),
    "a single quote that does not end": ("A='x", {"A": "x"}),
    "a quote that ends with the file": ('A="x\nB=2', {"A": "x\nB=2"}),
    "a quote that ends with a backslash": ('A="x\\', {"A": "x"}),
    "quoted parts, one after the other": ('A="a""b"\nB="a" "b"\nC=\'a\' "b"', dict.fromkeys("ABC", "ab")),
    "a plain part after quoted ones": ("A='a'b\nB=\"b\" c\n", {"A": "ab", "B": "bc"}),
    "quotes in a plain part": ('A=a"b"\nB=a "b" ', {"A": 'a"b"', "B": 'a "b"'}),
    "several lines in double quotes": ('A="x\ny"\nB=1', {"A": "x\ny", "B": "1"}),
    "several lines in single quotes": ("A='x\n\ny'\nB=1", {"A": "x\n\ny", "B": "1"}),
    "a line that goes on in double quotes": ('A="a\\\nb"', {"A": "ab"}),
    "no line goes on in single quotes": ("A='a\\\nb'", {"A": "a\\\nb"}),
    "a line that goes on after a quote": ('A="x"\\\ny', {"A": "xy"}),
    "blanks where a line goes on": ("A=x \\\n y \nB=1", {"A": "x  y", "B": "1"}),
    "a value that begins on the next line": ("A=\\\nB=2", {"A": "B=2"}),
    "a comment that goes on": ("# a\\\nB=1\nC=2", {"C": "2"}),
    "no comment after a value": ('A="b" # c\nB="b"#c', {"A": "b# c", "B": "b#c"}),
    "blanks before a backslash at the end": ("A=a \\", {"A": "a "}),
    "a backslash at the end": ("A=a\\", {"A": "a"}),
    "an escaped blank at the end": ("A=a\\ \nB=1", {"A": "a ", "B": "1"}),
    "a line of several lines without a name": ('A-B="\nA=1\n"\nC=2', {"C": "2"}),
    "a carriage return": ("A=1\rB=2", {"A": "1", "B": "2"}),
    "other white space isn't a blank": ("A=\tx\u00a0\nB=x\x0cb\u2028C=3", {"A": "x\u00a0", "B": "x\x0cb\u2028C=3"}),
    "a byte order mark isn't one either": ("\ufeffA=1\nB=2", {"B": "2"}),
    "escapes in double quotes": (r'A="a\"b\\c\$d\`e\nf"', {"A": 'a"b\\c$d`e\\nf'}),
    "no escapes in single quotes": (r"A='a\b\$c'", {"A": r"a\b\$c"}),
    "escapes without quotes": (r"A=a\ b\\c\"d", {"A": 'a b\\c"d'}),
    "a line that goes on": ("A=one,\\\ntwo\nB=3\n", {"A": "one,two", "B": "3"}),
    "an equals sign in a value": ("A=b=c==\n", {"A": "b=c=="}),
    "a hash in a value": ("A=b#c\nB=d # e\n", {"A": "b#c", "B": "d # e"}),
    "a dollar sign stays as it is": ("A=1\nB=$A ${A}\n", {"A": "1", "B": "$A ${A}"}),
    "a line without a name": ("=1\nA\nB=2\n", {"B": "2"}),
    "an invalid name": ("1A=1\nA-B=2\nexport C=3\nD=4\n", {"D": "4"}),
    "another script": ("A=ключ\n", {"A": "ключ"}),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES.keys())
def test_variables(text, expected):
    assert variables(text) == expected
