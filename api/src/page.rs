//! Pages of lists. One row more than a page holds is read, so that a cursor is answered only when there is more.

use borealis_engine::Error;

use crate::errors::Result;

/// The most rows of a page.
#[derive(Debug, Clone, Copy)]
pub struct Limit(i64);

impl Limit {
    /// What the caller asked for, or else `default`.
    ///
    /// # Errors
    /// 400 `invalid_limit` when it is not from 1 to `max`.
    pub fn new(asked: Option<i64>, default: i64, max: i64) -> Result<Self> {
        match asked.unwrap_or(default) {
            limit if (1..=max).contains(&limit) => Ok(Self(limit)),
            _ => Err(Error::field("invalid_limit", "limit", format!("must be from 1 to {max}")).into()),
        }
    }

    /// How many rows the page holds.
    #[must_use]
    pub fn rows(self) -> i64 {
        self.0
    }

    /// How many rows to read.
    #[must_use]
    pub fn and_one(self) -> i64 {
        self.0 + 1
    }

    /// Cuts what was read to a page. Answers the last row of the page when there is more.
    pub fn cut<T>(self, rows: &mut Vec<T>) -> Option<&T> {
        let limit = usize::try_from(self.0).unwrap_or(usize::MAX);
        let more = rows.len() > limit;
        rows.truncate(limit);
        rows.last().filter(|_| more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_cursor_only_when_there_is_more() {
        let limit = Limit::new(Some(2), 50, 100).unwrap();
        assert_eq!(limit.and_one(), 3);
        let mut rows = vec![1, 2, 3];
        assert_eq!((limit.cut(&mut rows).copied(), rows.as_slice()), (Some(2), &[1, 2][..]));
        for mut whole in [vec![], vec![1], vec![1, 2]] {
            assert_eq!(limit.cut(&mut whole), None);
        }
        assert_eq!(Limit::new(None, 50, 100).unwrap().rows(), 50);
        for wrong in [0, -1, 101, i64::MIN, i64::MAX] {
            assert_eq!(Limit::new(Some(wrong), 50, 100).unwrap_err().0.code, "invalid_limit");
        }
    }
}
