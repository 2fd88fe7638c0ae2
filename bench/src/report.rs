//! The table.

use core::fmt::Write as _;

use serde::Serialize;

use crate::cpu::Case;

/// A line of the table. Absent is what was not measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    #[serde(flatten)]
    pub(crate) case: Case,
    pub(crate) ours_us: f64,
    pub(crate) peer_us: Option<f64>,
    /// Peer over ours.
    pub(crate) ratio: Option<f64>,
    /// The quartiles of the ratio.
    pub(crate) spread: Option<(f64, f64)>,
    /// Rows a second of ours over those of plain reads of random rows of that size, in this run.
    pub(crate) limit_fraction: Option<f64>,
    /// The time that the same sums take over rows in the first cache, over ours: the share of it that is instructions, and not waiting
    /// for memory.
    pub(crate) work_fraction: Option<f64>,
    /// Why there is no peer.
    pub(crate) missing: Option<String>,
    /// The least ratio that is aimed at.
    pub(crate) target: Option<f64>,
}

#[derive(Serialize)]
pub(crate) struct Report<'a> {
    pub(crate) rows: &'a [Row],
}

/// The heading of [`line()`].
pub(crate) const HEADING: &str = "op        format    V      T    slots thr ids      ours us    peer us  ratio (quartiles)   target  of limit    work  peer";

/// A row as text.
pub(crate) fn line(row: &Row) -> String {
    let case = &row.case;
    let mut text = format!(
        "{:<9} {:<6} {:>5} {:>6}   2^{:<4} {:>3} {:<7}",
        case.op,
        case.format,
        case.v,
        case.t,
        case.slots.ilog2(),
        case.threads,
        if case.zipf { "zipf" } else { "uniform" }
    );
    let number = |x: Option<f64>, width: usize, digits: usize| match x {
        Some(x) => format!("{x:>width$.digits$}"),
        None => format!("{:>width$}", "-"),
    };
    let percent =
        |x: Option<f64>, width| number(x.map(|x| 100.0 * x), width, 0) + if x.is_some() { " %" } else { "  " };
    let quartiles = row.spread.map_or_else(String::new, |(a, b)| format!("({a:.2} {b:.2})"));
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "{} {} {} {:<14} {} {} {} {}",
        number(Some(row.ours_us), 11, 1),
        number(row.peer_us, 11, 1),
        number(row.ratio, 6, 2),
        quartiles,
        number(row.target, 6, 2),
        percent(row.limit_fraction, 7),
        percent(row.work_fraction, 5),
        row.missing.as_ref().map_or_else(|| case.peer.to_owned(), |why| format!("{}: {why}", case.peer)),
    );
    text
}
