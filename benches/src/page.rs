//! `docs/benchmarks.md`, the tables of `docs/scaling.md` and their charts, out of a report. What
//! people wrote on the pages stays: only what is between the two marks is written anew.

use std::{fs, path::Path};

use plotters::prelude::*;

use crate::{
    Result,
    report::{Figure, Report, Series},
};

const PAGE: &str = "docs/benchmarks.md";
const SCALING: &str = "docs/scaling.md";
/// The chart of that page.
const SCALING_CHART: &str = "scale";
const CHARTS: &str = "docs/benchmarks";
const BEGIN: &str = "<!-- Written by scripts/bench --write-docs: begin -->\n";
const END: &str = "<!-- Written by scripts/bench --write-docs: end -->\n";

/// What a figure is to reach.
enum Reach {
    AtLeast(f64),
    AtMost(f64),
    None,
}

/// The figures of the page, in its order.
const FIGURES: [(&str, &str, Reach); 24] = [
    (
        "append_vs_hello",
        "Append, throughput / hello",
        Reach::AtLeast(0.70),
    ),
    (
        "append_vs_naive",
        "Append, throughput / naive",
        Reach::AtLeast(1.00),
    ),
    (
        "append_p50_vs_naive",
        "Append, p50 of one caller / naive",
        Reach::AtMost(1.15),
    ),
    (
        "get50_vs_naive",
        "last 50 of 10,000, throughput / naive, which parses nothing",
        Reach::AtLeast(0.90),
    ),
    (
        "get20_flat",
        "last 20, time at 1,000,000 messages / at 20",
        Reach::AtMost(1.10),
    ),
    (
        "append_flat",
        "Append, time at 1,000,000 messages / at 20",
        Reach::AtMost(1.10),
    ),
    (
        "embedded_append_vs_hello",
        "Append to the file, durable, throughput / hello",
        Reach::AtLeast(0.50),
    ),
    (
        "uds_vs_tcp",
        "Append, throughput over a Unix socket / TCP",
        Reach::AtLeast(1.2),
    ),
    (
        "hello_uds_vs_tcp",
        "the same of *hello*: what the transport alone gives",
        Reach::None,
    ),
    (
        "server_cpu_us_append",
        "CPU of the server per Append, µs",
        Reach::None,
    ),
    (
        "server_cpu_append_vs_naive",
        "the same / naive",
        Reach::None,
    ),
    (
        "server_cpu_us_get50",
        "CPU of the server per last 50, µs",
        Reach::None,
    ),
    ("server_cpu_get50_vs_naive", "the same / naive", Reach::None),
    (
        "idle_rss_mib",
        "memory of an idle server, MiB",
        Reach::AtMost(12.0),
    ),
    (
        "start_ms",
        "process start to first answer, ms",
        Reach::AtMost(50.0),
    ),
    (
        "binary_mib",
        "the stripped program, MiB",
        Reach::AtMost(20.0),
    ),
    (
        "turns_held",
        "turns at once, 20 tokens/s each, no token later than 100 ms",
        Reach::AtLeast(2_000.0),
    ),
    (
        "turn_kib",
        "memory per running turn, KiB",
        Reach::AtMost(64.0),
    ),
    (
        "first_token_added_us",
        "delay added to the first token, 100 turns, p50, µs",
        Reach::AtMost(1_000.0),
    ),
    ("first_token_added_us_p99", "the same, p99", Reach::None),
    (
        "token_added_us_p99",
        "delay added to a token, 100 turns, p99, µs",
        Reach::AtMost(1_000.0),
    ),
    ("token_added_us_p50", "the same, p50", Reach::None),
    (
        "memory_per_message_vs_raw",
        "bytes of Redis per message, all included / LangChain's element",
        Reach::AtMost(1.15),
    ),
    (
        "memory_per_message_vs_raw_by_two",
        "the same, appended by two",
        Reach::None,
    ),
];

/// The figures of the page about scaling.
const SCALING_FIGURES: [(&str, &str); 13] = [
    (
        "scale_work_per_server_2",
        "CPU of each of 2 servers / of one alone",
    ),
    ("scale_work_per_server_4", "the same of 4"),
    (
        "scale_work_per_node_3",
        "commands of each of 3 masters / of one alone",
    ),
    ("scale_work_per_node_6", "the same of 6"),
    (
        "scale_cpu_per_node_3",
        "CPU of each of 3 masters / of one alone",
    ),
    ("scale_cpu_per_node_6", "the same of 6"),
    (
        "scale_busiest_node_3",
        "commands of the busiest of 3 masters / of all, on average",
    ),
    ("scale_busiest_node_6", "the same of 6"),
    (
        "scale_bus_receiver_us_3",
        "CPU of a message from another of 3 masters, µs",
    ),
    ("scale_bus_receiver_us_6", "the same of 6"),
    ("scale_bus_bytes_3", "its bytes"),
    ("scale_bus_bytes_6", "the same of 6"),
    (
        "scale_index_bytes_per_session",
        "bytes of the index for each session, on one master",
    ),
];

/// Writes the pages of which the report has something, and the charts.
pub fn write(report: &Report) -> Result<()> {
    fs::create_dir_all(CHARTS)?;
    for series in &report.series {
        draw(series)?;
    }
    if !report.tables.is_empty() {
        fill(PAGE, &generated(report))?;
    }
    if !report.scaling.is_empty() {
        fill(SCALING, &scaling(report))?;
    }
    Ok(())
}

fn fill(path: &str, text: &str) -> Result<()> {
    let page = fs::read_to_string(path)?;
    let (before, rest) = page.split_once(BEGIN).ok_or("the page has no begin mark")?;
    let (_, after) = rest.split_once(END).ok_or("the page has no end mark")?;
    fs::write(path, format!("{before}{BEGIN}\n{text}\n{END}{after}"))?;
    Ok(())
}

fn scaling(report: &Report) -> String {
    let mut text = String::new();
    for line in &report.machine {
        text += &format!("- {line}\n");
    }
    text += "\n| figure | what | value | rounds from – to |\n|---|---|---|---|\n";
    for (name, what) in &SCALING_FIGURES {
        if let Some(figure) = report.figures.iter().find(|figure| figure.name == *name) {
            let value = number(figure.value);
            text += &format!("| `{name}` | {what} | {value} | {} |\n", spread(figure));
        }
    }
    for table in &report.scaling {
        text += &format!("\n### {}\n\n{}", table.title, table.markdown());
    }
    for series in report
        .series
        .iter()
        .filter(|series| series.name == SCALING_CHART)
    {
        text += &chart(series);
    }
    text
}

fn chart(series: &Series) -> String {
    format!(
        "\n![{} by {}](benchmarks/{}.svg)\n",
        series.y, series.x, series.name
    )
}

fn generated(report: &Report) -> String {
    let mut text = String::from("### The machine\n\n");
    for line in &report.machine {
        text += &format!("- {line}\n");
    }
    text += "\n### Figures\n\n| figure | what | to reach | reached | rounds from – to | |\n";
    text += "|---|---|---|---|---|---|\n";
    for (name, what, reach) in &FIGURES {
        if let Some(figure) = report.figures.iter().find(|figure| figure.name == *name) {
            text += &figure_row(figure, what, reach);
        }
    }
    for table in &report.tables {
        text += &format!("\n### {}\n\n{}", table.title, table.markdown());
    }
    text += "\n### Charts\n";
    for series in report
        .series
        .iter()
        .filter(|series| series.name != SCALING_CHART)
    {
        text += &chart(series);
    }
    text
}

/// From the least to the most, where there are several rounds.
fn spread(figure: &Figure) -> String {
    match &figure.rounds[..] {
        [] | [_] => String::new(),
        rounds => {
            let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
            let most = rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            format!("{} – {}", number(least), number(most))
        }
    }
}

fn figure_row(figure: &Figure, what: &str, reach: &Reach) -> String {
    let (wanted, verdict) = match reach {
        Reach::AtLeast(least) => (format!("≥ {least}"), figure.value >= *least),
        Reach::AtMost(most) => (format!("≤ {most}"), figure.value <= *most),
        Reach::None => (String::new(), true),
    };
    let verdict = match (reach, verdict) {
        (Reach::None, _) => "",
        (_, true) => "reached",
        (_, false) => "**missed**",
    };
    let spread = spread(figure);
    let value = number(figure.value);
    format!(
        "| `{}` | {what} | {wanted} | {value} | {spread} | {verdict} |\n",
        figure.name
    )
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

const COLOURS: [RGBColor; 6] = [
    RGBColor(110, 110, 110),
    RGBColor(230, 130, 20),
    RGBColor(30, 90, 200),
    RGBColor(20, 150, 150),
    RGBColor(150, 50, 160),
    RGBColor(200, 40, 50),
];

/// How wide a chart is, without the names of its lines.
const SIZE: (u32, u32) = (860, 420);

fn draw(series: &Series) -> Result<()> {
    let path = Path::new(CHARTS).join(format!("{}.svg", series.name));
    let points = || series.lines.iter().flat_map(|(_, points)| points);
    let x_max = points().map(|point| point.0).fold(1.0, f64::max);
    let x_min = points().map(|point| point.0).fold(x_max, f64::min);
    let y_max = points().map(|point| point.1).fold(0.0, f64::max);
    let y_min = points().map(|point| point.1).fold(y_max, f64::min);
    let root = SVGBackend::new(&path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut builder = ChartBuilder::on(&root);
    builder
        .margin(16)
        // Half of the last label.
        .margin_right(40)
        .x_label_area_size(44)
        .y_label_area_size(70);
    let legend = match series.name.as_str() {
        SCALING_CHART => SeriesLabelPosition::UpperRight,
        _ => SeriesLabelPosition::UpperLeft,
    };
    let decimal = |number: f64| {
        let digits = format!("{number:.4}");
        digits
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned()
    };
    let plain = |number: &f64| decimal(*number);
    // Everything but throughput and shares spans powers.
    macro_rules! chart {
        ($x:expr, $y:expr, $x_label:expr) => {{
            let mut chart = builder.build_cartesian_2d($x, $y)?;
            chart
                .configure_mesh()
                .light_line_style(RGBColor(240, 240, 240))
                .x_desc(&series.x)
                .y_desc(&series.y)
                .x_label_formatter(&$x_label)
                .y_label_formatter(&plain)
                .draw()?;
            for ((name, points), colour) in series.lines.iter().zip(COLOURS.iter().cycle()) {
                let colour = *colour;
                chart
                    .draw_series(LineSeries::new(
                        points.iter().copied(),
                        colour.stroke_width(2),
                    ))?
                    .label(name)
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                    });
            }
            chart
                .configure_series_labels()
                .position(legend.clone())
                .background_style(WHITE.mix(0.8))
                .border_style(RGBColor(200, 200, 200))
                .draw()?;
        }};
    }
    match series.name.as_str() {
        "latency" => {
            let percentile = |x: &f64| decimal(100.0 * (1.0 - 0.5_f64.powf(*x)));
            chart!(x_min..x_max, (y_min..y_max * 1.2).log_scale(), percentile);
        }
        "length" => {
            chart!(
                (x_min..x_max).log_scale(),
                (y_min * 0.8..y_max * 1.2).log_scale(),
                plain
            );
        }
        SCALING_CHART => chart!(0.0..x_max * 1.1, 0.0..y_max * 1.15, plain),
        _ => chart!((x_min..x_max).log_scale(), 0.0..y_max * 1.15, plain),
    }
    root.present()?;
    Ok(())
}
