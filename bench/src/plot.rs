//! What a run leaves: the table as text, the rows as JSON, and plots of cost.

use core::fmt::Write as _;
use std::path::Path;

use plotters::prelude::*;

use crate::error::BenchError;
use crate::report::{HEADING, Report, Row, line};

const COLORS: [RGBColor; 10] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xd6, 0x27, 0x28),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x94, 0x67, 0xbd),
    RGBColor(0xff, 0x7f, 0x0e),
    RGBColor(0x8c, 0x56, 0x4b),
    RGBColor(0x17, 0xbe, 0xcf),
    RGBColor(0x7f, 0x7f, 0x7f),
    RGBColor(0xe3, 0x77, 0xc2),
    RGBColor(0xbc, 0xbd, 0x22),
];

/// Writes `cpu.txt`, `cpu.json` and the plots into `folder`.
pub(crate) fn write(folder: &Path, machine: &str, rows: &[Row]) -> Result<(), BenchError> {
    let io = |source| BenchError::Io { path: folder.to_owned(), source };
    std::fs::create_dir_all(folder).map_err(io)?;
    let mut text = format!("{machine}\n{}\n\n{HEADING}\n", std::env::args().collect::<Vec<_>>().join(" "));
    for row in rows {
        let _ = writeln!(text, "{}", line(row));
    }
    std::fs::write(folder.join("cpu.txt"), text).map_err(io)?;
    let json = serde_json::to_string(&Report { rows }).map_err(|e| BenchError::Plot(e.to_string()))?;
    std::fs::write(folder.join("cpu.json"), json + "\n").map_err(io)?;
    let most = rows.iter().map(|row| row.case.threads).max().unwrap_or(1);
    let base = |row: &&Row| row.case.threads == most && !row.case.zipf && row.case.peer != "candle";
    let select = |format: &'static str| move |row: &&Row| row.case.op == "select" && row.case.format == format;
    let at = |row: &Row, us: f64| (row.case.slots as f64, us);
    let mut curves = Vec::new();
    for format in ["f32", "int8"] {
        let rows = rows.iter().filter(base).filter(select(format)).filter(|row| row.case.t == 256);
        curves.push((format!("ours, {format} keys"), rows.map(|row| at(row, row.ours_us)).collect()));
    }
    let peers = rows.iter().filter(base).filter(select("f32")).filter(|row| row.case.t == 256);
    curves.push(("PyTorch".to_owned(), peers.filter_map(|row| Some(at(row, row.peer_us?))).collect()));
    chart(&folder.join("select-slots.svg"), "select, 256 tokens", ("slots", "us"), curves)?;

    let bags = |of: fn(&Row) -> f64, keep: fn(&Row) -> bool, peers: bool| {
        let mut curves: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        for row in rows.iter().filter(base).filter(|row| row.case.op == "bag_sum" && keep(row)) {
            let mut push = |name: String, us: f64| match curves.iter_mut().find(|(n, _)| *n == name) {
                Some((_, points)) => points.push((of(row), us)),
                None => curves.push((name, vec![(of(row), us)])),
            };
            push(row.case.format.to_owned(), row.ours_us);
            if let (Some(us), true) = (row.peer_us, peers && matches!(row.case.format, "f32" | "int8")) {
                push(format!("{} {}", row.case.peer, row.case.format), us);
            }
        }
        curves
    };
    let curves = bags(|row| row.case.t as f64, |row| row.case.v == 256 && row.case.slots == 1 << 20, true);
    chart(&folder.join("bag-tokens.svg"), "bag_sum, V = 256, 2^20 slots", ("tokens", "us"), curves)?;
    let curves = bags(|row| row.case.v as f64, |row| row.case.t == 256 && row.case.slots == 1 << 20, false);
    chart(&folder.join("bag-width.svg"), "bag_sum, 256 tokens, 2^20 slots", ("V", "us"), curves)?;
    let curves = bags(|row| row.case.slots as f64, |row| row.case.t == 256 && row.case.v == 256, false);
    chart(&folder.join("bag-slots.svg"), "bag_sum, 256 tokens, V = 256", ("slots", "us"), curves)
}

/// Curves over logarithmic axes. Those of all a run measured go up to the right, so their names stand below.
pub(crate) fn chart(
    path: &Path,
    title: &str,
    (x, y): (&str, &str),
    mut curves: Vec<(String, Vec<(f64, f64)>)>,
) -> Result<(), BenchError> {
    curves.retain(|(_, points)| points.len() > 1);
    for (_, points) in &mut curves {
        points.iter_mut().for_each(|point| point.0 = point.0.log2());
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let all = || curves.iter().flat_map(|(_, points)| points);
    let ends = |of: fn(&(f64, f64)) -> f64| {
        all().map(of).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)))
    };
    // A name is a twentieth of the height, and stands below the curves.
    let ((left, right), (low, high)) = (ends(|p| p.0), ends(|p| p.1));
    let below = (high / low).powf(0.15 + 0.06 * curves.len() as f64).max(1.3);
    let sizes = |x: &f64| match *x {
        x if x.fract() != 0.0 => String::new(),
        x if x < 16.0 => format!("{:.0}", x.exp2()),
        x => format!("2^{x:.0}"),
    };
    if curves.is_empty() {
        return Ok(());
    }
    let draw = || -> Result<(), Box<dyn core::error::Error>> {
        let root = SVGBackend::new(path, (720, 480)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 17))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d(left - 0.3..right + 0.3, (low / below..high * 1.3).log_scale())?;
        chart
            .configure_mesh()
            .x_desc(x)
            .y_desc(y)
            .x_label_formatter(&sizes)
            .light_line_style(WHITE)
            .label_style(("sans-serif", 12))
            .draw()?;
        for ((name, points), color) in curves.iter().zip(COLORS.iter().cycle()) {
            let drawn =
                chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(3))?;
            let legend = |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2));
            drawn.label(name.clone()).legend(legend);
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .label_font(("sans-serif", 12))
            .draw()?;
        root.present()?;
        Ok(())
    };
    draw().map_err(|e| BenchError::Plot(e.to_string()))
}
