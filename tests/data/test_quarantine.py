"""The quarantine file: written at once, skipped from where it failed, shared by hosts, robust to a kill."""

import json

import pytest
from stores import store

from iv3jax.data.quarantine import Dropped, Quarantine
from iv3jax.errors import UserError

BAD = Dropped("a.jsonl:3", "timeout", "not read after 2 seconds")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_is_on_the_disk_at_once_and_read_again(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    first = Quarantine(path)
    first.add(BAD, 17)
    assert lines(path) == [
        {"name": "a.jsonl:3", "kind": "timeout", "reason": BAD.reason, "index": 17, "count": 1}
    ]
    again = Quarantine(path)
    assert again.find("a.jsonl:3", 17) is not None and again.find("a.jsonl:4", 99) is None
    # What was read before it failed is read again by a run that goes on from there.
    assert again.find("a.jsonl:3", 16) is None
    # It was being read for a later place, too, when it failed.
    first.add(BAD, 44)
    assert first.find("a.jsonl:3", 17) is not None and Quarantine(path).find("a.jsonl:3", 17) is not None


def test_counts_are_kept_at_the_end(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add(BAD, 17)
    quarantine.add(Dropped("é.jsonl:1", "unreadable", "ünwell"), 3)
    quarantine.met("a.jsonl:3")
    quarantine.save()
    assert {line["name"]: line["count"] for line in lines(path)} == {"a.jsonl:3": 2, "é.jsonl:1": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["quarantine.jsonl"]
    assert len(Quarantine(path)) == 2


def test_hosts_write_apart_and_read_all(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    one, two = Quarantine(path, 0, 2), Quarantine(path, 1, 2)
    one.add(BAD, 17)
    two.add(Dropped("a.jsonl:3", "failed", "at once"), 9)
    two.add(Dropped("b:1", "failed", "too"), 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quarantine-0.jsonl", "quarantine-1.jsonl"]
    for host, hosts in ((0, 2), (1, 2), (0, 1), (3, 4)):
        found = Quarantine(path, host, hosts)
        assert len(found) == 2
        assert found.find("a.jsonl:3", 9) is not None
    # One that has nothing of its own to say writes nothing.
    Quarantine(path, 0, 1).save()
    assert not path.exists()


def test_nothing_is_written_without_a_path():
    quarantine = Quarantine(None)
    quarantine.add(BAD, 0)
    quarantine.save()
    assert quarantine.find(BAD.name, 0) is not None


def test_a_line_cut_off_by_a_kill_is_no_error(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add(BAD, 1)
    with path.open("a") as file:
        file.write('{"name": "b:1", "kin')
    assert len(Quarantine(path)) == 1


@pytest.mark.medium
def test_on_a_store():
    with store("s3") as bucket:
        path = bucket / "run" / "quarantine.jsonl"
        first = Quarantine(path)
        first.add(BAD, 17)
        first.add(Dropped("b:1", "failed", "too"), 4)
        assert [entry["name"] for entry in lines(path)] == ["a.jsonl:3", "b:1"]
        again = Quarantine(path, 1, 2)
        assert again.find("b:1", 4) is not None and again.find("b:1", 3) is None


@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"name": "a", "kind": "b", "reason": "c", "index": -2}', '{"name": "a"}', "x"]
)
def test_a_damaged_file_is_named(tmp_path, line):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add(BAD, 1)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"quarantine\.jsonl:2"):
        Quarantine(path)
