//! Logs. They hold fields, and never message text.

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, filter::ParseError, fmt};

use crate::config::LogFormat;

/// Other crates whose records may quote what they transport. They are never let through.
const SILENT: [&str; 4] = ["h2", "hyper", "reqwest", "genai"];

/// Takes the setting of what to log.
pub fn parse_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    let mut parsed = EnvFilter::builder().parse(filter)?;
    for name in SILENT {
        parsed = parsed.add_directive(format!("{name}=off").parse()?);
    }
    Ok(parsed)
}

/// Writes logs to standard error from now on. Does nothing if logs are written already.
pub fn start(format: LogFormat, filter: &str) -> Result<(), ParseError> {
    let filter = parse_filter(filter)?;
    let subscriber = fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false);
    let started = match format {
        LogFormat::Json => subscriber.json().flatten_event(true).try_init(),
        LogFormat::Auto | LogFormat::Text => {
            let colour = format == LogFormat::Auto && std::io::stderr().is_terminal();
            subscriber.with_ansi(colour).try_init()
        }
    };
    // Only a second start fails, and the first one serves as well.
    drop(started);
    Ok(())
}
