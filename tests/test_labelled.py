"""What finetune_glue.py and finetune_xsum.py share: tables, splits, results, the step."""
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
import torch

import finetune


def read(path, text, **how):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(where.removeprefix(f'{path}, '), row)
            for where, row in finetune.read_tables([str(path)], **how)]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    text = '\n{"a": 1}\n  \r\n{"a": 2}\n\n'
    assert read(tmp_path / 'a.jsonl', text) == [('row 2', {'a': 1}), ('row 4', {'a': 2})]
    for ending, sep in (('csv', ','), ('tsv', '\t')):
        text = f'a{sep}b\r\n1{sep}2\r\n\r\n3{sep}4'
        assert read(tmp_path / f'a.{ending}', text) == [
            ('row 1', {'a': '1', 'b': '2'}), ('row 3', {'a': '3', 'b': '4'})]


def test_a_csv_has_quotes_and_a_tsv_has_none(tmp_path):
    rows = read(tmp_path / 'a.csv', 'a,b\n"x, ""y""\nzø",2019-05-01\n')
    assert rows == [('row 1', {'a': 'x, "y"\nzø', 'b': '2019-05-01'})]
    text = 'a\tb\n"önë\t1\n"two\t"2"\nthree\r"\t3\n'
    rows = read(tmp_path / 'a.tsv', text)
    assert [row for _, row in rows] == [dict(a='"önë', b='1'), dict(a='"two', b='"2"'),
                                        dict(a='three\r"', b='3')]


def test_values_stay_what_they_are(tmp_path):
    line = '{"id": "2019-05-01", "n": 7, "s": "007", "x": "NA"}\n'
    wanted = {'id': '2019-05-01', 'n': 7, 's': '007', 'x': 'NA'}
    (_, row), = read(tmp_path / 'a.jsonl', line, numbers=['s'])
    assert row == wanted
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([wanted]), tmp_path / 'a.parquet')
    (_, row), = finetune.read_tables([str(tmp_path / 'a.parquet')], numbers=['s'])
    assert row == wanted
    (_, row), = read(tmp_path / 'a.csv', 'id,s,x\n01,-1.50,1e3\n', numbers=['s', 'x', 'y'])
    assert row == {'id': '01', 's': -1.5, 'x': '1e3'}


def test_a_byte_order_mark_and_long_cells(tmp_path):
    assert read(tmp_path / 'a.tsv', '\ufeffa\nx\n') == [('row 1', {'a': 'x'})]
    assert read(tmp_path / 'a.jsonl', '\ufeff{"a": "x"}\n') == [('row 1', {'a': 'x'})]
    assert read(tmp_path / 'a.csv', 'a,b\n' + 'x' * 200_000 + ',y\n')[0][1]['b'] == 'y'


@pytest.mark.parametrize('file, text, message', [
    ('a.jsonl', '{"a": 1}\n\n{"a": \n', r'a.jsonl, row 3 cannot be read \(Expecting value'),
    ('a.jsonl', '{"a": 1}\n' * 3000 + 'x', 'row 3001 cannot be read'),
    ('a.jsonl', '"text"\n', r'row 1 cannot be read \(it is no object'),
    ('a.jsonl', '\n\nnull\n', r'row 3 cannot be read \(it is no object'),
    ('a.jsonl', '[' * 100_000, 'row 1 cannot be read'),
    ('a.jsonl', b'{"a": 1}\n{"a": "\xe9"}\n', 'row 2 cannot be read .*utf-8'),
    ('a.tsv', b'a\n' + b'x\n' * 3000 + b'\xe9\n', 'row 3001 cannot be read .*utf-8'),
    ('a.csv', b'a\n' + b'x\n' * 3000 + b'\xe9\n', 'row 3001 cannot be read .*utf-8'),
    ('a.jsonl', '{"a": 1}'.encode('utf-16'), 'row 1 cannot be read .*utf-8'),
    ('a.csv', 'a,b\n1,2\n1\n', 'row 2 cannot be read .it has more or fewer values than there are'),
    ('a.csv', 'a,b\n"x"y,2\n', 'row 1 cannot be read'),
    ('a.csv', 'a,b\n"x,2\n', 'row 1 cannot be read'),
    ('a.tsv', 'a\tb\n1\t2\t3\n', 'row 1 cannot be read .it has more or fewer'),
    ('a.parquet', 'PAR1', 'row 1 cannot be read')])
def test_what_cannot_be_read_is_named(file, text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / file, text)
    assert str(error.value).count('\n') == 0 and str(error.value).endswith('repair or delete it')


def test_rows_that_are_cut_off_can_be_left_out(tmp_path):
    broken = []
    rows = read(tmp_path / 'a.tsv', 'a\tb\n1\t2\n3\n4\t5\t6\n7\t8\n', broken=broken)
    assert [where for where, _ in rows] == ['row 1', 'row 4']
    assert broken == [str(tmp_path / 'a.tsv')] * 2


def test_splits_and_shards(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).touch()

    def found(split, **how):
        return [path.removeprefix(f'{tmp_path}/') for path in
                finetune.find_split(str(tmp_path), split, **how)]

    touch('trains.jsonl', 'train.txt', 'train.jsonl.bak', 'dev_matched.tsv', 'README.md')
    assert found('train', optional=True) == []
    assert found('validation_matched') == ['dev_matched.tsv']
    for split, looked_for in (
            ('train', 'train.jsonl, train.parquet, train.csv, train.tsv, or shards'),
            ('validation', 'validation.tsv, dev.jsonl')):
        with pytest.raises(ValueError) as error:
            found(split)
        said = str(error.value)
        assert 'it holds README.md, dev_matched.tsv, train.jsonl.bak, train.txt,' in said
        assert looked_for in said
    shards = [f'train-{n:05}-of-00011-0123456789abcdef.parquet' for n in range(11)]
    touch(*shards[1:])
    with pytest.raises(ValueError, match='is one of 11 shards, but those there .* numbers 1, '):
        found('train')
    touch(again := shards[1].replace('0123', '4567'))
    with pytest.raises(ValueError, match='numbers 1, 1, 2, .*, 10: give each once'):
        found('train')
    (tmp_path / again).unlink()
    touch(shards[0])
    assert found('train') == shards
    touch('train.csv')
    with pytest.raises(ValueError, match='train.csv are the same split: keep one of them'):
        found('train')
    with pytest.raises(ValueError, match='nowhere has no split train: it holds nothing'):
        finetune.find_split(str(tmp_path / 'nowhere'), 'train')


def test_results_that_are_there(tmp_path):
    path = tmp_path / 'a.json'
    assert finetune.read_result(str(path), dict(a=1)) == (None, None)
    result = dict(settings=dict(a=1, b=2), score=3)
    path.write_text(json.dumps(result))
    assert finetune.read_result(str(path), dict(a=1)) == (result, None)
    assert finetune.read_result(str(path), dict(a=1, b=3)) == (result, 'b')
    assert finetune.read_result(str(path), dict(c=1)) == (result, 'c')
    for text in ('{"settings": ', '[]', '{}', '{"settings": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match='a.json is not a result of this script .*: delete it'):
            finetune.read_result(str(path), dict(a=1))


def test_the_nearest_row_is_named():
    rows = ['GPT2 small', 'MoM_P small', 'MoM_P medium']
    finetune.check_row('', rows, 'Table 5')
    finetune.check_row('MoM_P small', rows, 'Table 5')
    for wrong, near in (('mom_p small', 'MoM_P small'), ('MoM_P_medium', 'MoM_P medium'),
                        ('gpt2', 'GPT2 small')):
        with pytest.raises(ValueError, match=f"no row of Table 5; did you mean '{near}'"):
            finetune.check_row(wrong, rows, 'Table 5')


def test_a_warning_where_more_than_a_tenth_is_cut():
    assert finetune.cut_note(10, 100) == 'truncated 10 of 100'
    assert finetune.cut_note(0, 0) == 'truncated 0 of 0'
    assert finetune.cut_note(1165, 1244).startswith('truncated 1,165 of 1,244 (warning: 94%')


def test_the_rate_rises_and_falls():
    rates = [finetune.linear_rate(step, 10, 2.0, 0.2) for step in range(10)]
    assert rates == pytest.approx([1, 2, *(2 * n / 8 for n in range(8, 0, -1))])
    assert finetune.linear_rate(0, 5, 1.0, 0.0) == 1.0


def test_padding():
    assert finetune.pad([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]]
    assert finetune.pad([[1]], 9, width=3).tolist() == [[1, 9, 9]]


def test_settings_that_are_too_small():
    good = dict(seeds=1, micro_batch=1, max_train=0, max_eval=0, epochs=0, batch_size=1,
                learning_rate=0.0, weight_decay=0.0, grad_clip=0.0, warmup=0.1, beams=1,
                dtype='auto')
    finetune.check_settings(good, beams=1)
    wrong = dict(learning_rate=(-1.0, math.nan, math.inf), batch_size=(0,), beams=(0, -1))
    for key, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f'{key}={value} must be at least '):
                finetune.check_settings({**good, key: value}, beams=1)
    for value in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match='is a share of the steps'):
            finetune.check_settings({**good, 'warmup': value})
    with pytest.raises(ValueError, match="dtype='float16' must be one of 'auto', 'bfloat16', 'fl"):
        finetune.check_settings({**good, 'dtype': 'float16'})
    finetune.check_settings({**good, 'batch_size': 0}, batch_size=0)


def test_no_step_on_what_is_not_finite():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1.0)
    for loss, gradient in ((math.nan, 1.0), (1.0, math.inf)):
        p.grad = torch.full((2,), gradient)
        with pytest.raises(ValueError, match='here: loss .* Take a lower --learning_rate.*; then'):
            finetune.update(optimizer, [p], loss, 0.1, 1.0, 'here', 'then')
    assert p.tolist() == [1, 1]
    p.grad = torch.full((2,), 3.0)
    norm = finetune.update(optimizer, [p], 1.0, 0.5, 0, 'here', 'then')  # 0: no clipping
    assert norm == pytest.approx(math.sqrt(18)) and p.tolist() == [-0.5, -0.5]
    assert p.grad is None
