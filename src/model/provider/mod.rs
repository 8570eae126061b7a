//! Models of providers, over the `genai` crate: OpenAI, Anthropic, Gemini and others by the name
//! of the model, each in its own protocol, and whatever speaks OpenAI's by its URL.
//!
//! Knows neither gRPC nor any store, and does not read the environment: who makes a [`Provider`]
//! says how to look a key up.
//!
//! - `request`: a [`Prompt`] as `genai` takes it.
//! - `answer`: what `genai` streams as [`Pieces`].
//! - `failure`: what `genai` reports as [`Error`]s.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt as _;
use genai::adapter::AdapterKind;
use genai::resolver::{AuthData, Endpoint};
use genai::{Client, ClientConfig, Headers, ModelIden, ServiceTarget, WebConfig};
use reqwest::Url;
use tracing::Dispatch;
use tracing::instrument::WithSubscriber as _;

use self::answer::Increments;
use self::failure::Context;
use super::{Error, Model, Pieces, Prompt, Result};
use crate::secret::Secret;

mod answer;
mod failure;
mod request;

/// What a provider is and how long to wait for it.
#[derive(Clone)]
pub struct Settings {
    /// The model that answers if a prompt names none. Without a URL it also chooses the provider:
    /// `gpt-…`, `claude-…`, `gemini-…`, or with the provider's name before it, as in
    /// `groq::llama-3.3-70b-versatile`.
    pub model: String,
    /// The base URL of something that speaks OpenAI's protocol: `http://localhost:11434/v1`. All
    /// models are asked there, whatever their names look like.
    pub url: Option<String>,
    /// Without `url`: where the provider is asked in its own protocol, in place of its public
    /// address. For gateways, and for tests.
    pub native_url: Option<String>,
    /// The key. Without it, a URL is asked without one, and a provider with the one that its usual
    /// variable holds.
    pub api_key: Option<Secret>,
    /// How long a connection may take to come about.
    pub connect_timeout: Duration,
    /// How long the provider may be silent: before its answer begins, and between two reads. A
    /// model on a small machine can need a minute to read a long prompt.
    pub idle_timeout: Duration,
}

impl Settings {
    /// Settings for this model, with the defaults for all else.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            url: None,
            native_url: None,
            api_key: None,
            connect_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
        }
    }
}

/// Settings that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSettings {
    #[error("the model has no name")]
    NoModel,

    #[error("the model's URL {0}")]
    Url(String),

    #[error("the model {model:?} needs a key: set the variable {variable}")]
    NoKey {
        model: String,
        variable: &'static str,
    },

    #[error("the model's key has characters that an HTTP header cannot hold")]
    Key,

    #[error("the model {model:?} cannot be used: {reason}")]
    Model { model: String, reason: String },

    #[error("no HTTP client for the model: {0}")]
    Client(String),
}

/// Connections that wait for the next turn, at most: turns end and begin at any time, and each that
/// finds none waits for a new one, with TLS for several ways to the provider and back. `genai` would
/// keep 4. One takes 25 KiB, and goes when it has waited for 90 s.
const IDLE_CONNECTIONS_MAX: usize = 64;

/// Which names of models may be asked for, and how they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// As they are: they only ever stand in the body of a request.
    Verbatim,
    /// As `genai` writes them. Some providers have the name in the path of the URL.
    Genai,
}

/// The models of one provider, at one address, with one key.
pub struct Provider {
    client: Client,
    /// Where and how the default model is asked; other models differ by the name only.
    target: ServiceTarget,
    names: Names,
    model: String,
    /// The address, for people.
    place: String,
    key: Option<Secret>,
    connect_timeout: Duration,
    idle_timeout: Duration,
}

impl Provider {
    /// Checks the settings. Nothing is sent yet. `key` looks a variable up by its name, such as
    /// `OPENAI_API_KEY`.
    pub fn new(
        settings: Settings,
        key: impl Fn(&str) -> Option<String>,
    ) -> std::result::Result<Self, BadSettings> {
        if settings.model.is_empty() {
            return Err(BadSettings::NoModel);
        }
        let given_key = settings.api_key.as_ref().map(|secret| secret.expose());
        let (target, names, address, key) = match &settings.url {
            Some(url) => {
                let base = base_url(url)?;
                let key = given_key.map(usable_key).transpose()?;
                let target = openai_target(&base, key.as_deref(), &settings.model)?;
                (target, Names::Verbatim, base, key)
            }
            None => {
                let mut target = native_target(&settings.model)?;
                let base = match &settings.native_url {
                    Some(url) => base_url(url)?,
                    None => base_url(target.endpoint.base_url())?,
                };
                target.endpoint = Endpoint::from_owned(base.as_str());
                let key = match given_key {
                    Some(key) => Some(usable_key(key)?),
                    None => native_key(&target, &settings.model, key)?,
                };
                if let Some(key) = &key {
                    target.auth = AuthData::from_single(key.as_str());
                }
                (target, Names::Genai, base, key)
            }
        };
        Ok(Self {
            client: client(&address, settings.connect_timeout)?,
            target,
            names,
            model: settings.model,
            place: place(address),
            key: key.map(Secret::from),
            connect_timeout: settings.connect_timeout,
            idle_timeout: settings.idle_timeout,
        })
    }

    /// How to ask for this model: at the same address and with the same key as for any other.
    fn target(&self, model: &str) -> Result<ServiceTarget> {
        let kind = self.target.model.adapter_kind;
        if self.names == Names::Genai && !is_safe_name(model, kind) {
            return Err(Error::UnknownModel(model.to_owned()));
        }
        let mut target = self.target.clone();
        target.model = ModelIden::new(kind, model);
        Ok(target)
    }
}

#[async_trait]
impl Model for Provider {
    async fn answer(&self, prompt: Prompt) -> Result<Pieces> {
        let model = prompt.model.clone().unwrap_or_else(|| self.model.clone());
        let target = self.target(&model)?;
        let context = Context {
            kind: target.model.adapter_kind,
            model,
            key: self.key.as_ref().map(|key| key.expose().to_owned()),
            connect_timeout: self.connect_timeout,
            idle_timeout: self.idle_timeout,
        };
        let increments = Arc::new(Increments::default());
        let verbatim_name = self.names == Names::Verbatim;
        let options = request::options(&prompt, increments.clone(), &context, verbatim_name);
        let request = request::request(prompt, context.kind)?;
        // Nothing is sent before the stream is polled.
        let response = self
            .client
            .exec_chat_stream(target, request, Some(&options))
            .with_subscriber(Dispatch::none())
            .await
            .map_err(|error| failure::before_sending(error, &context))?;
        Ok(answer::pieces(response.stream, increments, context))
    }

    fn default_model(&self) -> &str {
        &self.model
    }

    fn describe(&self) -> String {
        let kind = self.target.model.adapter_kind.as_str();
        format!("{} ({kind} protocol, {})", self.model, self.place)
    }
}

/// The HTTP client: no proxy that the environment names, for it would read every conversation; no
/// redirects, for they would carry a conversation to a host that nobody configured.
fn client(address: &Url, connect_timeout: Duration) -> std::result::Result<Client, BadSettings> {
    let mut builder = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none());
    if address.scheme() == "http" {
        // Nothing will be encrypted. An image that holds nothing but this program has no
        // certificates, and must do for a model beside it.
        builder = builder.tls_certs_only([]);
    }
    let http = WebConfig::default()
        .with_connect_timeout(connect_timeout)
        .apply_to_builder(builder)
        .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
        .build()
        .map_err(|error| BadSettings::Client(failure::innermost(&error)))?;
    Client::builder()
        .with_reqwest(http)
        .build()
        .map_err(|_| BadSettings::Client("genai refuses it".to_owned()))
}

/// Reads a base URL: with a slash at its end, or else its last part would be lost when the path
/// of a method is joined to it.
fn base_url(text: &str) -> std::result::Result<Url, BadSettings> {
    let bad = |rule: &str| BadSettings::Url(rule.to_owned());
    let mut url = Url::parse(text).map_err(|error| bad(&format!("is not one: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("must begin with http:// or https://"));
    }
    if url
        .path()
        .trim_end_matches('/')
        .ends_with("/chat/completions")
    {
        return Err(bad("must be the base URL, without /chat/completions"));
    }
    url.set_fragment(None);
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

/// The address for people: without a user, a password and a query, where keys can be.
fn place(mut url: Url) -> String {
    // These fail only for URLs without a host, which `base_url` has refused.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.into()
}

/// A key without the space around it that files and secret stores tend to add.
fn usable_key(key: &str) -> std::result::Result<String, BadSettings> {
    let key = key.trim();
    let fits = !key.is_empty() && key.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    fits.then(|| key.to_owned()).ok_or(BadSettings::Key)
}

/// A target that speaks OpenAI's protocol at a URL. The whole request line and the headers are
/// ours: so no `Authorization` is sent where there is no key, and a query stays in place.
fn openai_target(
    base: &Url,
    key: Option<&str>,
    model: &str,
) -> std::result::Result<ServiceTarget, BadSettings> {
    let mut url = base
        .join("chat/completions")
        .map_err(|error| BadSettings::Url(format!("is not a base: {error}")))?;
    url.set_query(base.query());
    let headers = match key {
        Some(key) => Headers::from(("Authorization", format!("Bearer {key}"))),
        None => Headers::default(),
    };
    Ok(ServiceTarget {
        endpoint: Endpoint::from_owned(base.as_str()),
        auth: AuthData::RequestOverride {
            url: url.into(),
            headers,
        },
        model: ModelIden::new(AdapterKind::OpenAI, model),
    })
}

/// The target that `genai` knows for a model's name.
fn native_target(model: &str) -> std::result::Result<ServiceTarget, BadSettings> {
    let bad = |reason: &str| BadSettings::Model {
        model: model.to_owned(),
        reason: reason.to_owned(),
    };
    // It is a future for resolvers that wait; there are none here, so it is ready at once.
    let target = ClientConfig::default()
        .resolve_model_spec(model.into())
        .now_or_never()
        .and_then(|target| target.ok())
        .ok_or_else(|| bad("no provider is known for it"))?;
    if let AdapterKind::Custom(_) = target.model.adapter_kind {
        // Its address would come from a variable that `genai` reads by itself.
        return Err(bad("set the model's URL in place of the genai_ prefix"));
    }
    if !is_safe_name(model, target.model.adapter_kind) {
        return Err(bad("its name has characters that no model's has"));
    }
    Ok(target)
}

/// The key in the provider's usual variable, if it needs one.
fn native_key(
    target: &ServiceTarget,
    model: &str,
    key: impl Fn(&str) -> Option<String>,
) -> std::result::Result<Option<String>, BadSettings> {
    let kind = target.model.adapter_kind;
    let Some(variable) = kind.default_key_env_name() else {
        return Ok(None);
    };
    let found = key(variable).or_else(|| match kind {
        // AWS's own name for it.
        AdapterKind::BedrockApi => key("AWS_BEARER_TOKEN_BEDROCK"),
        _ => None,
    });
    match found.as_deref().map(str::trim) {
        Some(key) if !key.is_empty() => usable_key(key).map(Some),
        // A server on the same machine, which often has no key.
        _ if kind == AdapterKind::Omlx => Ok(None),
        _ => Err(BadSettings::NoKey {
            model: model.to_owned(),
            variable,
        }),
    }
}

/// Whether a name can be put into a request to this kind of provider: it may stand in the path of
/// the URL, where it must not lead elsewhere, and its prefix must not name another provider.
fn is_safe_name(model: &str, kind: AdapterKind) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/@+".contains(c);
    if model.is_empty() || !model.chars().all(is_plain) || model.contains("..") {
        return false;
    }
    match model.split_once("::") {
        Some(_) => AdapterKind::from_model(model).is_ok_and(|named| named == kind),
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_key(_: &str) -> Option<String> {
        None
    }

    fn bad(settings: Settings) -> String {
        match Provider::new(settings, no_key) {
            Ok(provider) => panic!("accepted: {}", provider.describe()),
            Err(error) => error.to_string(),
        }
    }

    fn with_url(url: &str) -> Settings {
        Settings {
            url: Some(url.to_owned()),
            ..Settings::new("llama")
        }
    }

    #[test]
    fn a_missing_key_is_reported_by_the_name_of_its_variable() {
        for (model, variable) in [
            ("gpt-4o", "OPENAI_API_KEY"),
            ("gpt-5", "OPENAI_API_KEY"),
            ("claude-sonnet-4-5", "ANTHROPIC_API_KEY"),
            ("gemini-2.5-flash", "GEMINI_API_KEY"),
            ("groq::llama-3.3-70b-versatile", "GROQ_API_KEY"),
        ] {
            assert_eq!(
                bad(Settings::new(model)),
                format!("the model {model:?} needs a key: set the variable {variable}")
            );
        }
    }

    #[test]
    fn a_key_comes_from_the_function_that_was_given_and_from_nowhere_else() {
        let asked = std::cell::RefCell::new(Vec::new());
        let provider = Provider::new(Settings::new("claude-sonnet-4-5"), |name| {
            asked.borrow_mut().push(name.to_owned());
            Some("  sk-1\n".to_owned())
        })
        .expect("the key is there");
        assert_eq!(*asked.borrow(), ["ANTHROPIC_API_KEY"]);
        assert!(matches!(&provider.target.auth, AuthData::Key(key) if key == "sk-1"));
    }

    #[test]
    fn bad_urls_are_refused_with_the_reason() {
        for (url, rule) in [
            ("localhost:11434/v1", "must begin with http:// or https://"),
            ("/v1", "is not one: relative URL without a base"),
            ("http://", "is not one: empty host"),
            (
                "http://localhost/v1/chat/completions",
                "must be the base URL, without /chat/completions",
            ),
        ] {
            assert_eq!(bad(with_url(url)), format!("the model's URL {rule}"));
        }
    }

    #[test]
    fn a_key_that_no_header_can_hold_is_refused_and_not_printed() {
        let mut settings = with_url("http://localhost/v1");
        settings.api_key = Some("se\ncret".into());
        let error = bad(settings.clone());
        assert!(!error.contains("cret"), "{error}");
        assert_eq!(format!("{:?}", settings.api_key), "Some(***)");
    }

    #[test]
    fn a_description_holds_no_secrets() {
        let mut settings = with_url("https://me:secret@example.com/v1?key=secret");
        settings.api_key = Some("secret".into());
        let provider = Provider::new(settings, no_key).expect("good settings");
        assert_eq!(
            provider.describe(),
            "llama (OpenAI protocol, https://example.com/v1/)"
        );
    }

    #[test]
    fn a_prompt_cannot_choose_another_provider_or_another_path() {
        let provider = Provider::new(Settings::new("gemini-2.5-flash"), |_| Some("k".into()))
            .expect("the key is there");
        for model in [
            "openai::gpt-4o",
            "../../v1/files?x=",
            "a?b",
            "a#b",
            "a b",
            "",
            "gemini::../x",
        ] {
            assert_eq!(
                provider.target(model).err(),
                Some(Error::UnknownModel(model.to_owned()))
            );
        }
        for model in ["gemini-2.5-pro", "gemini::gemini-2.5-pro", "claude-x"] {
            let target = provider.target(model).expect("a good name");
            assert_eq!(target.model.adapter_kind, AdapterKind::Gemini);
            assert!(matches!(&target.auth, AuthData::Key(key) if key == "k"));
        }
    }
}
