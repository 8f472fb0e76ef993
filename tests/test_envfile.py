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
    "one quote": ('A="\n', {"A": '"'}),
    "a quote that does not end": ('A="x\n', {"A": '"x'}),
    "escapes in double quotes": (r'A="a\"b\\c\$d\`e\nf"', {"A": 'a"b\\c$d`e\\nf'}),
    "no escapes in single quotes": (r"A='a\b\$c'", {"A": r"a\b\$c"}),
    "escapes without quotes": (r"A=a\ b\\c\"d", {"A": 'a b\\c"d'}),
    "a line that goes on": ("A=one,\\\ntwo\nB=3\n", {"A": "one,two", "B": "3"}),
    "an equals sign in a value": ("A=b=c==\n", {"A": "b=c=="}),
    "a hash in a value": ("A=b#c\nB=d # e\n", {"A": "b#c", "B": "d # e"}),
    "a dollar is no variable": ("A=1\nB=$A ${A}\n", {"A": "1", "B": "$A ${A}"}),
    "a line without a name": ("=1\nA\nB=2\n", {"B": "2"}),
    "a name that is none": ("1A=1\nA-B=2\nexport C=3\nD=4\n", {"D": "4"}),
    "another script": ("A=ключ\n", {"A": "ключ"}),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES.keys())
def test_variables(text, expected):
    assert variables(text) == expected
