"The last gaps of reading: ranges of bars that are stamped at their end"
import pandas as pd
import pytest

from kronos_nb.core import DataError
from kronos_nb.data.calendar import future_stamps
from kronos_nb.data.read import read_klines


@pytest.mark.parametrize('names', [['X'], ['X', 'Y']])
def test_a_range_counts_the_starts_of_bars(tmp_path, names):
    "start <= timestamps < end holds of what is returned, not of the stamps in the file"
    for name in names:
        stamps = pd.date_range('2024-01-02 09:35', periods=6, freq='5min')
        rows = ''.join(f'{t},1,2,0.5,1.5,10\n' for t in stamps)
        (tmp_path/f'{name}.csv').write_text('day,open,high,low,close,volume\n' + rows)
    first, last = pd.Timestamp('2024-01-02 09:35'), pd.Timestamp('2024-01-02 09:50')
    bars = read_klines(tmp_path, bar_end=True, start=first, end=last)
    assert bars.timestamps.tolist() == list(pd.date_range(first, last, freq='5min', inclusive='left'))*len(names)
    dates = 'date,open,high,low,close,volume\n2024-01-02,1,2,0.5,1.5,10\n2024-01-03,1,2,0.5,1.5,10\n'
    (tmp_path/'d.csv').write_text(dates)
    assert len(read_klines(tmp_path/'d.csv', bar_end=True, start='2024-01-02', end='2024-01-03')) == 1 # not moved


def test_amounts_of_other_vendors(tmp_path):
    for name in ('total_turnover', 'TurnoverValue'):
        (tmp_path/'X.csv').write_text(f'date,open,high,low,close,volume,{name}\n2024-01-02,1,2,0.5,1.5,10,15\n')
        assert read_klines(tmp_path/'X.csv').amount.tolist() == [15]


def test_a_workbook_says_what_to_do(tmp_path):
    (tmp_path/'X.xlsx').write_bytes(b'PK\3\4\0\0\0\0')
    with pytest.raises(DataError, match='csv'): read_klines(tmp_path/'X.xlsx')


@pytest.mark.parametrize('zone,tz,day,said', [
    ('America/New_York', None, '2024-03-08', True), ('America/New_York', None, '2024-03-20', True),
    ('America/New_York', 'America/New_York', '2024-03-08', False), ('America/New_York', None, '2024-06-14', False),
    ('Asia/Shanghai', 'Asia/Shanghai', '2024-03-08', False)])
def test_a_change_of_clocks_in_sight_is_said(zone, tz, day, said):
    "Bars of half an hour in UTC, whose market changes its clocks and whose zone nobody gave"
    days = pd.bdate_range(end=day, periods=20)
    local = pd.DatetimeIndex([d + pd.Timedelta(minutes=570 + 30*i) for d in days for i in range(13)], tz=zone)
    stamps = local.tz_convert('UTC').tz_localize(None)
    ahead, note = future_stamps(stamps, 13, tz=tz)
    assert ('clocks' in note) == said
    if tz: assert ahead.tz_localize('UTC').tz_convert(zone)[0].strftime('%H:%M') == '09:30'


def test_markets_that_never_close_do_not_mind_clocks():
    assert future_stamps(pd.date_range('2024-02-20', '2024-03-08', freq='h'), 48)[1] == ''
