//! The README is true: its grpcurl commands are run as they stand there, by the real grpcurl, and
//! print what they print there; its table holds every flag of the program. The examples in deploy/
//! name settings that exist, and docs/scaling.md shows what `scripts/size` says.
//!
//! `UPDATE_README=1 cargo test --test readme` writes what they print now into the README.

mod harness;

use std::{path::PathBuf, process::Command};

use chat_memory::store::redis::{Redis, Settings};
use harness::program::{Program, run};
use serde_json::Value;

const ADDRESS: &str = "127.0.0.1:50051";

fn readme_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("README.md")
}

/// What differs from run to run is replaced: ids and times that the server makes.
fn settle(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let sequence = fields.get("sequence").and_then(Value::as_str);
            let sequence = sequence.unwrap_or_default().to_owned();
            for (name, value) in fields {
                match (name.as_str(), value.as_str()) {
                    ("createTime", Some(_)) => *value = "2026-01-01T12:00:00.000Z".into(),
                    ("id", Some(id)) if id.starts_with("cm_") => {
                        *value = format!("cm_ZsUBu0AEXbq3R{sequence}").into();
                    }
                    ("turnId", Some(id)) if id.len() == 26 => {
                        *value = "01KDWAYZE0C4GX7M1H8S2P6DVB".into();
                    }
                    _ => settle(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(settle),
        _ => {}
    }
}

/// The output of a command: JSON values, settled and printed as grpcurl prints them, or text.
fn settled(output: &str) -> String {
    let values: Result<Vec<Value>, _> = serde_json::Deserializer::from_str(output)
        .into_iter()
        .collect();
    let Ok(mut values) = values else {
        return output.trim_end().to_owned();
    };
    values.iter_mut().for_each(settle);
    let texts = values
        .iter()
        .map(|value| serde_json::to_string_pretty(value).unwrap());
    texts.collect::<Vec<_>>().join("\n")
}

/// One after the other, as somebody does who reads it.
#[test]
fn the_grpcurl_commands_print_what_the_readme_shows() {
    let directory = tempfile::tempdir().unwrap();
    let server = Program::embedded(&directory.path().join("readme.db"));
    let run = |command: &str| {
        assert!(command.contains(ADDRESS), "{command}");
        let output = Command::new("sh")
            .args(["-c", &command.replace(ADDRESS, &server.addresses[0])])
            .output()
            .unwrap();
        assert_ne!(
            output.status.code(),
            Some(127),
            "grpcurl is missing: scripts/test installs it"
        );
        output
    };
    let readme = std::fs::read_to_string(readme_path()).unwrap();
    let mut updated = readme.clone();
    let (mut count, mut steps) = (0, 0);
    for block in readme.split("\n```").skip(1).step_by(2) {
        // Those without their output: a comment, and the command.
        if let Some(script) = block
            .strip_prefix("sh\n# ")
            .filter(|s| s.contains("grpcurl "))
        {
            for step in script.split("\n# ") {
                let (comment, command) = step.split_once('\n').unwrap();
                // A watch has no end.
                if !command.contains("/Watch") {
                    let output = run(command);
                    let errors = String::from_utf8_lossy(&output.stderr);
                    assert!(output.status.success(), "{comment}\n{errors}");
                    steps += 1;
                }
            }
        }
        let Some(block) = block.strip_prefix("console\n") else {
            continue;
        };
        let Some((command, shown)) = block.split_once('\n') else {
            continue;
        };
        let Some(command) = command
            .strip_prefix("$ ")
            .filter(|c| c.starts_with("grpcurl "))
        else {
            continue;
        };
        let output = run(command);
        let text = if output.status.success() {
            output.stdout
        } else {
            output.stderr
        };
        let printed = settled(&String::from_utf8(text).unwrap());
        let replaced = block.replacen(shown, &printed, 1);
        updated = updated.replacen(block, &replaced, 1);
        count += 1;
    }
    assert_eq!(
        (count, steps),
        (5, 7),
        "the README shows each method and an error"
    );
    if std::env::var_os("UPDATE_README").is_some() {
        std::fs::write(readme_path(), &updated).unwrap();
    }
    assert_eq!(std::fs::read_to_string(readme_path()).unwrap(), updated);
}

#[test]
fn the_table_holds_every_flag_with_its_variable_and_its_default() {
    let readme = std::fs::read_to_string(readme_path()).unwrap();
    let help = String::from_utf8(run(["serve", "--help"]).stdout).unwrap();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let rows: Vec<Vec<&str>> = readme
        .lines()
        .filter(|line| line.starts_with("| `--"))
        .map(|line| {
            line.split('|')
                .map(|cell| cell.trim().trim_matches('`'))
                .collect()
        })
        .collect();
    let variables = help.matches("[env: CHAT_MEMORY_").count();
    assert_eq!(rows.len(), variables, "one row for each variable");
    for row in rows {
        let (flag, variable, default) = (row[1], row[2], row[3]);
        assert!(
            help.contains(&format!("{flag} <")) || help.contains(&format!("{flag} ")),
            "{flag}"
        );
        assert!(help.contains(&format!("[env: {variable}")), "{variable}");
        if !matches!(default, "" | "off") {
            assert!(
                help.contains(&format!("[default: {default}]")),
                "{flag}: {default}"
            );
        }
    }
}

#[tokio::test]
async fn the_examples_of_deployment_name_settings_that_exist() {
    let readme = std::fs::read_to_string(readme_path()).unwrap();
    let (mut commands, mut urls) = (0, 0);
    for entry in std::fs::read_dir(readme_path().with_file_name("deploy")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(readme.contains(&format!("(deploy/{name})")), "{name}");
        let words =
            text.split(|character: char| !(character.is_alphanumeric() || character == '_'));
        // The first is the app's own.
        let variables =
            words.filter(|word| word.starts_with("CHAT_MEMORY_") && *word != "CHAT_MEMORY_ADDRESS");
        for variable in variables {
            assert!(
                readme.contains(&format!("`{variable}`")),
                "{name}: {variable}"
            );
        }
        for line in text.lines().map(str::trim) {
            if let Some(list) = line.strip_prefix("command: [\"--") {
                let flags: Vec<String> = serde_json::from_str(&format!("[\"--{list}")).unwrap();
                let mut arguments = vec!["serve".to_owned()];
                arguments.extend(flags);
                arguments.push("--help".to_owned());
                assert!(run(&arguments).status.success(), "{name}: {line}");
                commands += 1;
            }
            if let Some(url) = line.strip_prefix("CHAT_MEMORY_REDIS: ") {
                assert!(Redis::connect(Settings::new(url)).is_ok(), "{name}: {url}");
                urls += 1;
            }
        }
    }
    assert_eq!((commands, urls), (3, 3));
}

#[test]
fn the_sizes_on_paper_are_what_the_script_says() {
    let root = readme_path();
    let folder = root.parent().unwrap();
    let page = std::fs::read_to_string(folder.join("docs/scaling.md")).unwrap();
    let mut count = 0;
    for block in page.split("```text\n$ ").skip(1) {
        let (command, shown) = block.split_once('\n').unwrap();
        let shown = shown.split("\n```").next().unwrap();
        let output = Command::new("sh")
            .args(["-c", command])
            .current_dir(folder)
            .output()
            .unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(printed.trim_end(), shown, "{command}");
        count += 1;
    }
    assert_eq!(count, 2);
}

#[test]
fn every_file_that_the_documents_link_to_is_there() {
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = std::fs::read_to_string(readme_path().with_file_name(document)).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            assert!(
                readme_path().with_file_name(target).exists(),
                "{document}: {target}"
            );
        }
    }
}
