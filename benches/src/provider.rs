//! A model that says tokens at a steady rate and writes into each when it said it. It speaks
//! OpenAI's protocol over HTTP, as much of it as the server uses: a request with a body of known
//! length, an answer in chunks.
//!
//! The first token is ` f<came>:<said>`, the others ` <said>`: nanoseconds of the clock that all
//! processes share, `came` being when the request was read. The model `tokens-400` says 400 tokens.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{MissedTickBehavior, interval},
};

use crate::{Result, clock::now_ns};

/// Between two tokens: 20 in a second.
pub const TOKEN_EVERY: Duration = Duration::from_millis(50);
/// What names the model.
pub const MODEL: &str = "tokens-";

const TOKENS_DEFAULT: u32 = 20;
const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                    transfer-encoding: chunked\r\n\r\n";

/// Runs until the process is killed.
pub async fn run() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    crate::ready(&listener.local_addr()?.to_string());
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            // Whoever leaves in the middle of an answer has a reason.
            let _ = serve(stream).await;
        });
    }
}

async fn serve(mut stream: TcpStream) -> Result<()> {
    while let Some(body) = read_body(&mut stream).await? {
        let came = now_ns();
        answer(&mut stream, came, tokens(&body)).await?;
    }
    Ok(())
}

/// How many tokens the request asks for.
fn tokens(body: &[u8]) -> u32 {
    let at = body
        .windows(MODEL.len())
        .position(|window| window == MODEL.as_bytes());
    let digits = at.map_or(&[][..], |at| &body[at + MODEL.len()..]);
    let end = digits
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(digits.len());
    let text = std::str::from_utf8(&digits[..end]).unwrap_or_default();
    text.parse().unwrap_or(TOKENS_DEFAULT)
}

async fn read_body(stream: &mut TcpStream) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::with_capacity(2048);
    let head_length = loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = std::str::from_utf8(&bytes[..head_length])?.to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.ok_or("a request without a length")?.trim().parse()?;
    while bytes.len() < head_length + length {
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
    bytes.drain(..head_length);
    Ok(Some(bytes))
}

async fn answer(stream: &mut TcpStream, came: u64, tokens: u32) -> Result<()> {
    stream.write_all(HEAD.as_bytes()).await?;
    let mut ticks = interval(TOKEN_EVERY);
    // A model that was late goes on at its rate.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for index in 0..tokens {
        ticks.tick().await;
        let text = match index {
            0 => format!(" f{came}:{}", now_ns()),
            _ => format!(" {}", now_ns()),
        };
        let delta = format!(r#"{{"content":"{text}"}}"#);
        stream.write_all(&event(&delta, "null")).await?;
    }
    let mut end = event("{}", r#""stop""#);
    end.extend(chunk(&format!(
        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[],\
         \"usage\":{{\"prompt_tokens\":7,\"completion_tokens\":{tokens},\"total_tokens\":{}}}}}\n\n",
        tokens + 7
    )));
    end.extend(chunk("data: [DONE]\n\n"));
    end.extend(b"0\r\n\r\n");
    stream.write_all(&end).await?;
    Ok(())
}

fn event(delta: &str, finish_reason: &str) -> Vec<u8> {
    chunk(&format!(
        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\
         \"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{delta},\
         \"finish_reason\":{finish_reason}}}]}}\n\n"
    ))
}

/// One chunk of HTTP.
fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}
