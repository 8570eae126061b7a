//! Flame graphs: where the server's time goes under load, as `perf` finds it.
//!
//! The program must have been built with symbols and frame pointers, which a release has not.

use std::{
    fs::{self, File},
    io::{BufReader, Cursor},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use inferno::{
    collapse::{Collapse as _, perf::Folder},
    flamegraph,
};

use crate::{
    Bench, Result,
    load::{Target, drive},
    memory::{CALLERS, Stage},
};

/// Samples a second; no divisor of the timers' rates.
const FREQUENCY: &str = "1499";
const FOLDER: &str = "docs/benchmarks";

/// Draws one for Append and one for GetMessages.
pub async fn draw(bench: &Bench) -> Result<()> {
    let stage = Stage::new(bench).await?;
    let seconds = if bench.quick { 4 } else { 12 };
    let append = stage.append_alone();
    one(
        &stage,
        &append,
        seconds,
        "flame-append",
        "Append, 300 bytes",
    )
    .await?;
    let read = stage.read_alone()?;
    one(
        &stage,
        &read,
        seconds,
        "flame-get50",
        "GetMessages, the last 50",
    )
    .await
}

async fn one(stage: &Stage, target: &Target, seconds: u64, name: &str, title: &str) -> Result<()> {
    let data = stage.folder().join(name);
    let mut perf = Command::new("perf")
        .args([
            "record",
            "--quiet",
            "-e",
            "cpu-clock",
            "-F",
            FREQUENCY,
            "-g",
        ])
        .args(["-p", &stage.server_id().to_string(), "-o"])
        .arg(&data)
        .args(["--", "sleep", &seconds.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .map_err(|error| format!("perf: {error}"))?;
    let length = Duration::from_secs(seconds);
    drive(target, CALLERS, Duration::from_millis(500), length).await?;
    perf.wait()?;

    let script = Command::new("perf")
        .arg("script")
        .arg("-i")
        .arg(&data)
        .output()?;
    if !script.status.success() {
        return Err(String::from_utf8_lossy(&script.stderr).into_owned().into());
    }
    let mut folded = Vec::new();
    Folder::default().collapse(BufReader::new(Cursor::new(script.stdout)), &mut folded)?;
    let folded = String::from_utf8(folded)?;
    let mut options = flamegraph::Options::default();
    options.title = title.to_owned();
    // A page shows no script; what is narrower than a half of a percent says nothing there.
    options.no_javascript = true;
    options.min_width = 0.5;
    options.image_width = Some(1_200);
    fs::create_dir_all(FOLDER)?;
    let path = Path::new(FOLDER).join(format!("{name}.svg"));
    flamegraph::from_lines(&mut options, folded.lines(), File::create(&path)?)?;
    println!("{}", path.display());
    Ok(())
}
