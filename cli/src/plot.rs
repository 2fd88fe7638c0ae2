//! Pictures, as SVG.

use std::path::Path;

use plotters::prelude::*;

use crate::error::CliError;
use crate::recipe::Point;

/// A model's learning curve.
pub(crate) struct Curve<'a> {
    /// Its name, for the legend.
    pub(crate) name: String,
    /// Its points.
    pub(crate) points: &'a [Point],
}

const COLORS: [RGBColor; 4] =
    [RGBColor(0x1f, 0x77, 0xb4), RGBColor(0xd6, 0x27, 0x28), RGBColor(0x2c, 0xa0, 0x2c), RGBColor(0x94, 0x67, 0xbd)];

/// Draws recall and loss of several models over the steps of their training.
pub(crate) fn learning_curves(path: &Path, title: &str, curves: &[Curve<'_>]) -> Result<(), CliError> {
    let draw = || -> Result<(), Box<dyn core::error::Error>> {
        let root = SVGBackend::new(path, (960, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(title, ("sans-serif", 20))?;
        let (left, right) = root.split_horizontally(480);
        let steps = curves.iter().flat_map(|c| c.points).map(|p| p.step).max().unwrap_or(1);
        let loss = curves.iter().flat_map(|c| c.points).map(|p| p.loss).fold(0.0, f64::max);
        let percent = |p: &Point| 100.0 * p.recall;
        chart(&left, "held-out recall, % (about 1000 questions)", steps, 100.0, curves, percent)?;
        chart(&right, "loss, nats a token", steps, loss, curves, |p| p.loss)?;
        root.present()?;
        Ok(())
    };
    draw().map_err(|e| CliError::Plot { path: path.to_owned(), problem: e.to_string() })
}

fn chart<D: DrawingBackend>(
    area: &DrawingArea<D, plotters::coord::Shift>,
    caption: &str,
    steps: u64,
    top: f64,
    curves: &[Curve<'_>],
    value: impl Fn(&Point) -> f64,
) -> Result<(), Box<dyn core::error::Error>>
where
    D::ErrorType: 'static,
{
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(34)
        .y_label_area_size(44)
        .build_cartesian_2d(0u64..steps, 0.0..1.02 * top)?;
    chart.configure_mesh().x_desc("steps").light_line_style(WHITE).label_style(("sans-serif", 12)).draw()?;
    for (curve, color) in curves.iter().zip(COLORS) {
        let line = curve.points.iter().map(|p| (p.step, value(p)));
        let drawn = chart.draw_series(LineSeries::new(line, color.stroke_width(2)))?;
        drawn
            .label(curve.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    let place = if top > 50.0 { SeriesLabelPosition::LowerRight } else { SeriesLabelPosition::UpperRight };
    chart
        .configure_series_labels()
        .position(place)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .label_font(("sans-serif", 13))
        .draw()?;
    Ok(())
}

/// Cells on a side of the picture of slot use, at most.
const CELLS: usize = 64;

/// Draws how often slots were read (`[N²]`): a cell for a square of slots, first half down, second half across.
pub(crate) fn slot_use(path: &Path, counts: &[f64], sub_keys: usize) -> Result<(), CliError> {
    let cells = sub_keys.clamp(1, CELLS);
    let mut sums = vec![0.0; cells * cells];
    for (slot, count) in counts.iter().enumerate() {
        let (row, column) = (slot / sub_keys * cells / sub_keys, slot % sub_keys * cells / sub_keys);
        sums[row * cells + column] += count;
    }
    let most = sums.iter().copied().fold(1.0, f64::max);
    let draw = || -> Result<(), Box<dyn core::error::Error>> {
        let root = SVGBackend::new(path, (640, 680)).into_drawing_area();
        root.fill(&WHITE)?;
        let title = format!("reads of {} slots, darkest {most:.0} a cell, log scale", counts.len());
        let root = root.titled(&title, ("sans-serif", 16))?;
        let mut chart = ChartBuilder::on(&root).margin(16).build_cartesian_2d(0..cells, 0..cells)?;
        chart.draw_series(sums.iter().enumerate().map(|(i, &sum)| {
            let (row, column) = (cells - 1 - i / cells, i % cells);
            let shade = (1.0 + sum).ln() / (1.0 + most).ln();
            let color = ViridisRGB::get_color(1.0 - shade);
            Rectangle::new([(column, row), (column + 1, row + 1)], color.filled())
        }))?;
        root.present()?;
        Ok(())
    };
    draw().map_err(|e| CliError::Plot { path: path.to_owned(), problem: e.to_string() })
}
