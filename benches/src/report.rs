//! What was measured: for people a table, for programs JSON and a line for each figure.

use serde::{Deserialize, Serialize};

/// A number with a name, out of one or more rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    pub name: String,
    /// The median.
    pub value: f64,
    /// What each round gave.
    pub rounds: Vec<f64>,
}

/// A table for people.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Table {
    pub title: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
    pub notes: Vec<String>,
}

impl Table {
    pub fn new(title: &str, head: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            head: head.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub fn row(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    fn show(&self) {
        println!("\n{}\n\n{}", self.title, self.markdown());
    }

    /// As Markdown, with columns of one width each.
    pub fn markdown(&self) -> String {
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                let cells = cells.chain(self.head.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let line = |cells: &[String]| {
            let cells = cells.iter().zip(&widths);
            let cells: Vec<String> = cells
                .map(|(cell, width)| format!(" {cell:<width$} "))
                .collect();
            format!("|{}|\n", cells.join("|"))
        };
        let mut text = line(&self.head);
        let rules = widths.iter().map(|width| "-".repeat(width + 2));
        text += &format!("|{}|\n", rules.collect::<Vec<_>>().join("|"));
        for row in &self.rows {
            text += &line(row);
        }
        for note in &self.notes {
            text += &format!("\n{note}\n");
        }
        text
    }
}

/// What is drawn: lines of points.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Series {
    /// The name of its file.
    pub name: String,
    pub x: String,
    pub y: String,
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl Series {
    pub fn new(name: &str, x: &str, y: &str) -> Self {
        Self {
            name: name.to_owned(),
            x: x.to_owned(),
            y: y.to_owned(),
            lines: Vec::new(),
        }
    }

    pub fn line(&mut self, name: &str, points: Vec<(f64, f64)>) {
        self.lines.push((name.to_owned(), points));
    }
}

/// All that a run has shown.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// What it ran on, line by line.
    pub machine: Vec<String>,
    pub figures: Vec<Figure>,
    pub tables: Vec<Table>,
    pub series: Vec<Series>,
    /// The tables of another page.
    #[serde(default)]
    pub scaling: Vec<Table>,
}

impl Report {
    /// A figure of one round. A later one of the same name takes its place.
    pub fn figure(&mut self, name: &str, value: f64) {
        self.spread(name, vec![value]);
    }

    /// A figure of several rounds.
    pub fn spread(&mut self, name: &str, rounds: Vec<f64>) {
        self.figures.retain(|figure| figure.name != name);
        self.figures.push(Figure {
            name: name.to_owned(),
            value: median(&rounds),
            rounds,
        });
    }

    pub fn series(&mut self, series: Series) {
        self.series.push(series);
    }

    /// Shows a table and keeps it.
    pub fn table(&mut self, table: Table) {
        table.show();
        self.tables.push(table);
    }

    /// Shows a table of the page about scaling and keeps it.
    pub fn scaling(&mut self, table: Table) {
        table.show();
        self.scaling.push(table);
    }
}

/// The middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// Nanoseconds for people.
pub fn micros(ns: u64) -> String {
    match ns {
        0..10_000_000 => format!("{} µs", ns / 1_000),
        _ => format!("{} ms", ns / 1_000_000),
    }
}
