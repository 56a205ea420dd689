//! `boxlitefs prune`: which snapshots are kept, by restic's rules.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// How many snapshots are kept, of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// The newest ones.
    pub last: u32,
    /// The newest one of each of so many hours that have any.
    pub hourly: u32,
    /// The same of days.
    pub daily: u32,
    /// The same of weeks, which begin on Monday.
    pub weekly: u32,
    /// The same of months.
    pub monthly: u32,
}

/// A kind of period: its name, how many are kept, and what tells two of them apart.
type Period = (&'static str, u32, fn(usize, &DateTime) -> [i32; 4]);

impl Retention {
    /// Returns whether nothing at all would be kept.
    pub fn is_empty(&self) -> bool {
        *self == Retention::default()
    }

    /// Returns why each snapshot is kept; one without a reason is not. `times` are in seconds since
    /// 1970, the newest first. Periods are those of UTC.
    ///
    /// As with restic, the oldest snapshot is kept as well while a rule has kept fewer than it may.
    pub fn reasons(&self, times: &[i64]) -> Vec<Vec<&'static str>> {
        let mut kept = vec![Vec::new(); times.len()];
        for (name, count, period_of) in self.periods() {
            let mut left = count;
            let mut last = None;
            for (index, time) in times.iter().enumerate() {
                let period = period_of(index, &civil(*time));
                let is_oldest = index + 1 == times.len();
                if left > 0 && (last != Some(period) || is_oldest) {
                    kept[index].push(name);
                    last = Some(period);
                    left -= 1;
                }
            }
        }
        kept
    }

    fn periods(&self) -> [Period; 5] {
        [
            ("last", self.last, |index, _| {
                [i32::try_from(index).unwrap_or(i32::MAX), 0, 0, 0]
            }),
            ("hourly", self.hourly, |_, at| {
                [
                    at.year().into(),
                    at.month().into(),
                    at.day().into(),
                    at.hour().into(),
                ]
            }),
            ("daily", self.daily, |_, at| {
                [at.year().into(), at.month().into(), at.day().into(), 0]
            }),
            ("weekly", self.weekly, |_, at| {
                let week = at.date().iso_week_date();
                [week.year().into(), week.week().into(), 0, 0]
            }),
            ("monthly", self.monthly, |_, at| {
                [at.year().into(), at.month().into(), 0, 0]
            }),
        ]
    }
}

fn civil(seconds: i64) -> DateTime {
    let at = Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH);
    TimeZone::UTC.to_datetime(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: i64 = 3600;
    const DAY: i64 = 24 * HOUR;
    /// 2026-03-04, a Wednesday, at noon.
    const NOW: i64 = 1_772_625_600;

    /// Returns the positions of those that are kept.
    fn kept(retention: Retention, times: &[i64]) -> Vec<usize> {
        let reasons = retention.reasons(times).into_iter().enumerate();
        reasons
            .filter(|(_, reasons)| !reasons.is_empty())
            .map(|(index, _)| index)
            .collect()
    }

    #[test]
    fn the_newest_of_each_period_are_kept() {
        let none = Retention::default();
        assert!(none.is_empty());
        assert_eq!(kept(none, &[NOW, NOW - 1]), [0usize; 0]);
        let times: Vec<i64> = (0..96)
            .map(|half_hours| NOW - half_hours * HOUR / 2)
            .collect();
        assert_eq!(kept(Retention { last: 3, ..none }, &times), [0, 1, 2]);
        assert_eq!(kept(Retention { hourly: 3, ..none }, &times), [0, 1, 3]);
        assert_eq!(kept(Retention { daily: 2, ..none }, &times), [0, 25]);
        let both = Retention {
            last: 2,
            daily: 2,
            ..none
        };
        assert_eq!(kept(both, &times), [0, 1, 25]);
        assert_eq!(both.reasons(&times)[0], ["last", "daily"]);
    }

    #[test]
    fn periods_that_have_none_do_not_count_and_the_oldest_stays_while_a_rule_is_not_used_up() {
        let none = Retention::default();
        let times = [
            NOW,
            NOW - DAY,
            NOW - 40 * DAY,
            NOW - 41 * DAY,
            NOW - 400 * DAY,
        ];
        assert_eq!(kept(Retention { monthly: 2, ..none }, &times), [0, 2]);
        assert_eq!(kept(Retention { monthly: 9, ..none }, &times), [0, 2, 4]);
        assert_eq!(kept(Retention { daily: 3, ..none }, &times), [0, 1, 2]);
        // Monday is two days before.
        let week = [
            NOW,
            NOW - 2 * DAY,
            NOW - 3 * DAY,
            NOW - 4 * DAY,
            NOW - 30 * DAY,
        ];
        assert_eq!(kept(Retention { weekly: 2, ..none }, &week), [0, 2]);
        let same = [NOW, NOW - 1, NOW - 2];
        assert_eq!(kept(Retention { daily: 5, ..none }, &same), [0, 2]);
    }
}
