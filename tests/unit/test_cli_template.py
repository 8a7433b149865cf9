"""``--format``: the subset of Go's templates, and what `kata ps`, `images` and `inspect` print by it."""

from __future__ import annotations

from typing import Any

import pytest

from kata.cli.template import FreeKeys, Template, show_rows
from kata.errors import UsageError

DATA: dict[str, Any] = {
    "Name": "/web",
    "State": {"Status": "running", "Running": True, "Pid": 42},
    "Labels": FreeKeys({"a.b": "1", "tier": "x"}),
    "Args": ["one", "two"],
    "Ports": FreeKeys({"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}),
    "Nothing": None,
    "Label": lambda key="": f"<{key}>",
    "Lazy": lambda: "late",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{{.Name}} {{ .State.Status }}", "/web running"),
        ("{{.State.Running}} {{.State.Pid}} {{.Nothing}}", "true 42 <no value>"),
        ("{{.Args}} {{.State}}", "[one two] map[Pid:42 Running:true Status:running]"),
        ("{{json .Args}} {{.State | json}}", '["one","two"] {"Status":"running","Running":true,"Pid":42}'),
        ("{{json .}}", None),
        ('{{index .Args 1}} {{index .Labels "a.b"}}', "two 1"),
        ('{{(index (index .Ports "80/tcp") 0).HostPort}} {{(.State).Pid}}', "8080 42"),
        ("{{range .Args}}<{{.}}>{{end}}{{range $i, $v := .Args}}{{$i}}{{$v}}{{end}}", "<one><two>0one1two"),
        ("{{range $p, $c := .Ports}}{{$p}}={{range $c}}{{.HostPort}}{{end}}{{end}}", "80/tcp=8080"),
        ("{{range .Nothing}}x{{else}}none{{end}}", "none"),
        ("{{if .State.Running}}up{{else}}down{{end}}{{if not .State.Running}}x{{end}}", "up"),
        ('{{if eq .State.Status "exited"}}a{{else if gt .State.Pid 40}}b{{else}}c{{end}}!', "b!"),
        ('{{if eq .State.Status "exited"}}a{{else if gt .State.Pid 50}}b{{else}}c{{end}}!', "c!"),
        ("{{with .State}}{{.Pid}}{{$.Name}}{{end}}", "42/web"),
        ('{{$x := .State.Pid}}{{printf "%05d %s %q %v" $x .Name "q" .Args}}', '00042 /web "q" [one two]'),
        ('{{join .Args ","}} {{upper "up"}} {{len .Args}} {{slice .Name 1}}', "one,two UP 2 web"),
        ("a  {{- /* gone */ -}}  b {{- 1 -}} c", "ab1c"),
        ('{{.Label "k"}} {{.Lazy}} {{.Labels.tier}} {{.Labels.none}}', "<k> late x <no value>"),
        (
            '{{and true .Nothing}} {{or "" "b"}} {{ne 1 2}} {{`raw`}} {{print 1 "a"}}',
            "<no value> b true raw 1a",
        ),
    ],
)
def test_what_templates_have(text: str, expected: str | None) -> None:
    if expected is None:
        assert Template(text).render({"a": "<&>"}) == '{"a":"\\u003c\\u0026\\u003e"}'
        return
    assert Template(text).render(DATA) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{.Name", "not closed"),
        ("{{if .Name}}x", "no {{end}}"),
        ("{{end}}", "outside of a block"),
        ("{{else}}", "outside of a block"),
        ("{{}}", "is empty"),
        ("{{.Name !}}", "not understood"),
        ('{{"a" | }}', "is empty"),
        ("{{define}}", "not offered"),
        ("{{.Nane}}", "no field Nane.*State"),
        ("{{.Nothing.X}}", "what is not there"),
        ("{{nosuch .Name}}", "no function 'nosuch'"),
        ("{{$x}}", "no variable"),
        ("{{index .Args 7}}", "cannot be carried out"),
        ("{{len 3}}", "cannot be carried out"),
        ("{{range .Name}}{{end}}", "cannot go over"),
        ("{{(.Name}}", "do not match"),
        ('{{printf "%d" .Name}}', "cannot be carried out"),
        ("{{.Name .Args}}", "cannot be called"),
        (
            '{{printf "%999d%999d" 1 2 | printf "%s"}}{{pad "x" 1000000 1}}' + "{{range .Args}}" * 40,
            "no {{end}}",
        ),
    ],
)
def test_mistakes_are_named(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Template(text).render(DATA)


def test_a_result_is_bounded() -> None:
    with pytest.raises(UsageError, match="too long"):
        Template("{{range .}}{{range $}}{{range $}}" + "x" * 1000 + "{{end}}{{end}}{{end}}").render(
            ["a"] * 100
        )


def test_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"ID": "a1", "Names": "web"}, {"ID": "b22", "Names": lambda: "db"}]
    headings = {"ID": "CONTAINER ID", "Names": "NAMES"}

    def printed(form: str) -> str:
        show_rows(form, rows, headings)
        return capsys.readouterr().out

    assert printed("{{.ID}}\\t{{.Names}}") == "a1\tweb\nb22\tdb\n"
    assert printed("json") == '{"ID":"a1","Names":"web"}\n{"ID":"b22","Names":"db"}\n'
    assert printed("table {{.Names}}\\t{{.ID}}") == "NAMES   CONTAINER ID\nweb     a1\ndb      b22\n"
    assert printed("table").splitlines()[0].split() == ["CONTAINER", "ID", "NAMES"]
    show_rows("table", rows, headings, ["Names"])
    assert capsys.readouterr().out == printed("table {{.Names}}") == "NAMES\nweb\ndb\n"
    assert printed("") == printed("table")


@pytest.mark.parametrize("form", ["table {{.Nosuch}}", "{{.Nosuch}}", "{{.ID}} {{json .Nosuch}}"])
def test_a_field_that_is_not_there_is_refused_also_without_rows(form: str) -> None:
    with pytest.raises(UsageError, match=r"no field Nosuch.*ID, Label"):
        show_rows(form, [], {"ID": "CONTAINER ID"}, further=["Label"])


def test_fields_without_a_heading_and_variables_are_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows(
        'table {{.ID}}{{$x := .ID}}{{$x}}{{.Label "a"}}{{json .}}', [], {"ID": "ID"}, further=["Label"]
    )
    assert capsys.readouterr().out.startswith("ID")
