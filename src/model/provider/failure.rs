//! What `genai` reports as [`Error`]s. Lets no key and no text of ours through.

use std::error::Error as _;
use std::time::{Duration, SystemTime};

use genai::adapter::AdapterKind;
use genai::webc::{self, StreamTimeout};
use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde_json::Value;

use crate::model::Error;

/// Characters of a provider's own words that an error repeats, at most.
const WORDS_CHARS_MAX: usize = 500;

/// What was asked, as far as errors need to know.
pub(super) struct Context {
    pub kind: AdapterKind,
    pub model: String,
    pub key: Option<String>,
    pub connect_timeout: Duration,
    pub idle_timeout: Duration,
}

impl Context {
    /// Whether pieces of a tool call are what is new in them. In other protocols than OpenAI's,
    /// `genai` repeats in each what came before.
    pub(super) fn sends_increments(&self) -> bool {
        self.kind == AdapterKind::OpenAI
    }

    /// What a provider says, cut to a length for people, without our key and on one line.
    fn words(&self, text: &str) -> String {
        let text = match &self.key {
            Some(key) => text.replace(key.as_str(), "***"),
            None => text.to_owned(),
        };
        let words = text.split(|c: char| c.is_whitespace() || c.is_control());
        let mut line = String::new();
        for word in words.filter(|word| !word.is_empty()) {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        match line.char_indices().nth(WORDS_CHARS_MAX) {
            Some((end, _)) => line[..end].to_owned(),
            None => line,
        }
    }
}

/// An error while the request was made, before anything was sent.
pub(super) fn before_sending(error: genai::Error, context: &Context) -> Error {
    use genai::Error as E;
    match error {
        // These name what is not supported, and hold nothing of the conversation.
        E::MessageRoleNotSupported { .. }
        | E::MessageContentTypeNotSupported { .. }
        | E::ChatReqHasNoMessages { .. }
        | E::AdapterNotSupported { .. } => Error::Rejected(context.words(&error.to_string())),
        _ => Error::Rejected("it cannot be put into the provider's protocol".to_owned()),
    }
}

/// An error of the request, or in the stream of the answer.
pub(super) fn in_stream(error: genai::Error, context: &Context) -> Error {
    use genai::Error as E;
    match error {
        E::HttpError {
            status,
            body,
            headers,
            ..
        } => http(status, &headers, &body, context),
        E::WebStream { error, .. } => match error.downcast::<genai::Error>() {
            Ok(error) => in_stream(*error, context),
            Err(error) => {
                if let Some(timeout) = error.downcast_ref::<StreamTimeout>() {
                    silence(*timeout, context)
                } else if let Some(error) = error.downcast_ref::<reqwest::Error>() {
                    transport(error, context)
                } else {
                    Error::Broken("it is not UTF-8".to_owned())
                }
            }
        },
        E::WebModelCall { webc_error, .. } | E::WebAdapterCall { webc_error, .. } => {
            match webc_error {
                webc::Error::ResponseFailedStatus {
                    status,
                    body,
                    headers,
                } => http(status, &headers, &body, context),
                webc::Error::Reqwest(error) => transport(&error, context),
                _ => Error::Broken("it is not what the protocol says".to_owned()),
            }
        }
        E::ChatResponse { body, .. } => {
            let fault = Fault::of(&body);
            if let Some(status) = fault.status {
                return http(status, &HeaderMap::new(), &body.to_string(), context);
            }
            let words = fault.message.unwrap_or_default();
            Error::Broken(match context.words(&words) {
                words if words.is_empty() => "the provider reports an error".to_owned(),
                words => format!("the provider reports: {words}"),
            })
        }
        // About a syntax error it says where and which, not what stood there.
        E::StreamParse { serde_error, .. } => {
            let words = context.words(&serde_error.to_string());
            Error::Broken(format!("malformed: {words}"))
        }
        _ => Error::Broken("it is not what the protocol says".to_owned()),
    }
}

fn http(status: StatusCode, headers: &HeaderMap, body: &str, context: &Context) -> Error {
    let code = status.as_u16();
    let fault = serde_json::from_str(body)
        .map(|body: Value| Fault::of(&body))
        .unwrap_or_default();
    if code == 429 {
        let retry_after = retry_after(headers, SystemTime::now());
        return Error::RateLimited { retry_after };
    }
    if code == 408 || code >= 500 {
        return Error::Unavailable {
            reason: format!("HTTP {code}"),
            retry_after: retry_after(headers, SystemTime::now()),
        };
    }
    if code == 401 || code == 403 {
        // What the provider says may repeat parts of the key.
        return Error::Unauthorized(format!("HTTP {code}"));
    }
    if code == 404 || fault.names_no_model {
        return Error::UnknownModel(context.model.clone());
    }
    if status.is_redirection() {
        let reason = format!("HTTP {code}: it redirects, which is not followed");
        return Error::Rejected(reason);
    }
    let said = match fault.message {
        Some(message) => message,
        // A page of a proxy says nothing worth repeating.
        None if body.trim_start().starts_with(['<', '{', '[']) => String::new(),
        None => body.to_owned(),
    };
    Error::Rejected(match context.words(&said) {
        words if words.is_empty() => format!("HTTP {code}"),
        words => words,
    })
}

fn silence(timeout: StreamTimeout, context: &Context) -> Error {
    let seconds = context.idle_timeout.as_secs_f64();
    match timeout {
        StreamTimeout::Headers => Error::Unavailable {
            reason: format!("no answer within {seconds} s"),
            retry_after: None,
        },
        StreamTimeout::Read => Error::Broken(format!("nothing came for {seconds} s")),
    }
}

fn transport(error: &reqwest::Error, context: &Context) -> Error {
    let unavailable = |reason: String| Error::Unavailable {
        reason,
        retry_after: None,
    };
    if error.is_connect() && error.is_timeout() {
        let seconds = context.connect_timeout.as_secs_f64();
        unavailable(format!("no connection within {seconds} s"))
    } else if error.is_connect() {
        unavailable(format!("no connection: {}", innermost(error)))
    } else if error.is_request() {
        unavailable(format!("no answer: {}", innermost(error)))
    } else if error.is_builder() {
        Error::Rejected("it cannot be sent over HTTP".to_owned())
    } else {
        Error::Broken(innermost(error))
    }
}

/// The cause of an HTTP client's error. The outer ones repeat the URL, which can hold a key.
pub(super) fn innermost(error: &reqwest::Error) -> String {
    let Some(mut cause) = error.source() else {
        return "the HTTP client failed".to_owned();
    };
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// What the body of an error says.
#[derive(Debug, Default)]
struct Fault {
    message: Option<String>,
    /// The HTTP status that its code is. Within a stream, which began with 200, only this tells.
    status: Option<StatusCode>,
    /// It says that there is no such model.
    names_no_model: bool,
}

impl Fault {
    /// Reads `{"error": {"message", "code", "type"}}`, which nearly all send, and its variants:
    /// in a list, flat, or as a text only.
    fn of(body: &Value) -> Self {
        let body = body.get(0).unwrap_or(body);
        let error = body.get("error").unwrap_or(body);
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let message = text(error)
            .or_else(|| error.get("message").and_then(text))
            .or_else(|| body.get("message").and_then(text))
            .or_else(|| body.get("detail").and_then(text));
        let status = error.get("code").and_then(|code| {
            let code = text(code).unwrap_or_else(|| code.to_string());
            let status: StatusCode = code.parse().ok()?;
            (status.is_client_error() || status.is_server_error()).then_some(status)
        });
        let names_no_model = ["code", "type"]
            .into_iter()
            .filter_map(|name| error.get(name)?.as_str())
            .any(|name| {
                let letters = name.chars().filter(char::is_ascii_alphanumeric);
                let letters: String = letters.map(|c| c.to_ascii_lowercase()).collect();
                letters.contains("modelnotfound")
            });
        Self {
            message,
            status,
            names_no_model,
        }
    }
}

/// When to come back: in milliseconds (OpenAI's own header), in seconds, or at a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let number = |name: &str, unit: f64| {
        let number: f64 = text(name)?.trim().parse().ok()?;
        Duration::try_from_secs_f64(number * unit).ok()
    };
    let date = || {
        let date = httpdate::parse_http_date(text(RETRY_AFTER.as_str())?.trim()).ok()?;
        // A date that has passed: now.
        Some(date.duration_since(now).unwrap_or_default())
    };
    number("retry-after-ms", 0.001)
        .or_else(|| number(RETRY_AFTER.as_str(), 1.0))
        .or_else(date)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context {
        Context {
            kind: AdapterKind::OpenAI,
            model: "m".to_owned(),
            key: Some("sk-secret".to_owned()),
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
        }
    }

    fn wait(name: &'static str, value: &str) -> Option<Duration> {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2026 07:28:00 GMT").unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        retry_after(&headers, now)
    }

    #[test]
    fn retry_after_is_read_in_seconds_in_milliseconds_and_as_a_date() {
        let ms = Duration::from_millis;
        assert_eq!(wait("retry-after", "7"), Some(ms(7_000)));
        assert_eq!(wait("retry-after", "0.5"), Some(ms(500)));
        assert_eq!(wait("retry-after-ms", "1500"), Some(ms(1_500)));
        let date = "Wed, 21 Oct 2026 07:28:30 GMT";
        assert_eq!(wait("retry-after", date), Some(ms(30_000)));
        let past = "Wed, 21 Oct 2026 07:27:00 GMT";
        assert_eq!(wait("retry-after", past), Some(ms(0)));
        for odd in ["soon", "-5", "NaN", "inf", "1e300"] {
            assert_eq!(wait("retry-after", odd), None, "{odd}");
        }
    }

    #[test]
    fn an_error_repeats_a_providers_words_on_one_short_line_and_without_the_key() {
        let long = "sk-secret\u{7}is\n\nwrong ".to_owned() + &"ü".repeat(600);
        let words = context().words(&long);
        assert!(words.starts_with("*** is wrong üü"), "{words}");
        assert_eq!(words.chars().count(), WORDS_CHARS_MAX);
    }

    #[test]
    fn a_missing_model_is_known_by_its_code_whatever_the_status() {
        for body in [
            r#"{"error":{"code":"model_not_found","message":"x"}}"#,
            r#"[{"error":{"type":"ModelNotFoundError"}}]"#,
        ] {
            let error = http(StatusCode::BAD_REQUEST, &HeaderMap::new(), body, &context());
            assert_eq!(error, Error::UnknownModel("m".to_owned()));
        }
    }

    #[test]
    fn a_page_of_a_proxy_is_not_repeated() {
        let page = "<html><body>Bad request</body></html>";
        let error = http(StatusCode::BAD_REQUEST, &HeaderMap::new(), page, &context());
        assert_eq!(error, Error::Rejected("HTTP 400".to_owned()));
    }
}
