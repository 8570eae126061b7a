//! proto → Rust types and the descriptor set that server reflection serves. protox parses the
//! proto in Rust, so building needs no protoc. And the tokens of OpenAI's tokenizers, as
//! `src/tokens.rs` reads them.

use std::{
    env,
    error::Error,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use flate2::{Compression, write::ZlibEncoder};
use prost::Message as _;

const PROTO: &str = "chatmemory/v1/chat_memory.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);

    let descriptors = protox::compile([PROTO], ["proto"])?;
    // compile_fds() does not write the descriptor set itself.
    fs::write(
        out_dir.join("chatmemory.v1.bin"),
        descriptors.encode_to_vec(),
    )?;
    tonic_prost_build::configure()
        // Our codec turns a request that cannot be decoded into INVALID_ARGUMENT.
        .codec_path("crate::wire::Codec")
        .bytes(".")
        .compile_fds(descriptors)?;

    write_tokens(&out_dir, "o200k_base", &tiktoken_rs::o200k_base()?)?;
    write_tokens(&out_dir, "cl100k_base", &tiktoken_rs::cl100k_base()?)?;

    println!("cargo:rustc-env=CHAT_MEMORY_COMMIT={}", commit());
    if reads_packed_relocations() {
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
    Ok(())
}

/// Whether the program is for a glibc that reads the addresses it has to adjust from a packed table: 7 KB
/// in place of 600, all of which are read at the start and count as the program's memory from then on.
/// From 2.36 on; a program wants a glibc as new as the one it was built with anyway.
fn reads_packed_relocations() -> bool {
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
    let is_native = env::var("HOST").ok() == env::var("TARGET").ok();
    if !(is_native && is("CARGO_CFG_TARGET_OS", "linux") && is("CARGO_CFG_TARGET_ENV", "gnu")) {
        return false;
    }
    // It says `glibc 2.36`.
    let Ok(output) = Command::new("getconf").arg("GNU_LIBC_VERSION").output() else {
        return false;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let minor = text.trim().strip_prefix("glibc 2.").and_then(|minor| {
        let digits = minor.split('.').next()?;
        digits.parse::<u32>().ok()
    });
    minor.is_some_and(|minor| minor >= 36)
}

/// Writes the tokens of a tokenizer by their rank, of each its length, in one byte, and its bytes; all
/// of it compressed: 1.5 MB of the program in place of 2.3. (tiktoken-rs itself holds them as base64,
/// which are 5.3.)
fn write_tokens(
    out_dir: &Path,
    name: &str,
    tokenizer: &tiktoken_rs::CoreBPE,
) -> Result<(), Box<dyn Error>> {
    let mut tokens = Vec::new();
    // There is a gap between the last of them and the special tokens, which no text has.
    for rank in 0.. {
        let Ok(token) = tokenizer.decode_bytes(&[rank]) else {
            break;
        };
        tokens.push(u8::try_from(token.len())?);
        tokens.extend(token);
    }
    let mut packed = ZlibEncoder::new(Vec::new(), Compression::best());
    packed.write_all(&tokens)?;
    fs::write(out_dir.join(format!("{name}.tokens")), packed.finish()?)?;
    Ok(())
}

/// The commit this is built from, for `--version`: from the environment where the sources come
/// without git (an image build), else from git, else "unknown".
fn commit() -> String {
    println!("cargo:rerun-if-env-changed=CHAT_MEMORY_BUILD_COMMIT");
    if let Ok(commit) = env::var("CHAT_MEMORY_BUILD_COMMIT")
        && !commit.is_empty()
    {
        return commit;
    }
    for path in [".git/HEAD", ".git/logs/HEAD"] {
        if fs::exists(path).unwrap_or(false) {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let described = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output();
    match described {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => "unknown".to_owned(),
    }
}
