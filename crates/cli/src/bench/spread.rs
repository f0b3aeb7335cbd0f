//! Several measurements of one thing.

use std::fmt;

use serde::Serialize;

/// The middle of some measurements, and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// All zeros where nothing was measured.
    pub(crate) fn of(measurements: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = measurements.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(&min), Some(&max)) = (sorted.first(), sorted.last()) else { return Self::default() };
        Self { median: sorted[sorted.len() / 2], min, max }
    }
}

/// As the format's precision says: `median [min–max]`.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { median, min, max } = self;
        let digits = f.precision().unwrap_or(2);
        write!(f, "{median:.digits$} [{min:.digits$}–{max:.digits$}]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_ends() {
        let spread = Spread::of([3.0, 1.0, 2.0, 10.0, 0.5]);
        assert_eq!(spread, Spread { median: 2.0, min: 0.5, max: 10.0 });
        assert_eq!(format!("{spread:.1}"), "2.0 [0.5–10.0]");
        assert_eq!(Spread::of([]), Spread::default());
    }
}
