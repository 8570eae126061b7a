//! A [`Prompt`] as `genai` takes it. Sends what was said, never the reasoning behind it.

use std::sync::Arc;

use genai::adapter::AdapterKind;
use genai::chat::{
    Binary, ChatFrameSink, ChatMessage, ChatOptions, ChatRequest, ChatRole, ContentPart,
    CustomPart, MessageContent, ReasoningEffort, Tool, ToolCall, ToolResponse,
};
use serde_json::{Value, json};

use super::failure::Context;
use crate::message::{self, Content, Draft, Json, Part, Role};
use crate::model::{self, Error, Prompt, Result};

/// The conversation and the tools.
pub(super) fn request(prompt: Prompt, kind: AdapterKind) -> Result<ChatRequest> {
    let mut request = ChatRequest::new(messages(prompt.messages, kind)?);
    request.system = prompt.system.filter(|system| !system.is_empty());
    if !prompt.tools.is_empty() {
        let tools: Result<Vec<Tool>> = prompt.tools.into_iter().map(tool).collect();
        request.tools = Some(tools?);
    }
    Ok(request)
}

/// How to answer, and how long to wait.
pub(super) fn options(
    prompt: &Prompt,
    increments: Arc<dyn ChatFrameSink>,
    context: &Context,
    verbatim_name: bool,
) -> ChatOptions {
    let mut options = ChatOptions {
        temperature: prompt.options.temperature,
        top_p: prompt.options.top_p,
        max_tokens: prompt.options.max_output_tokens,
        stop_sequences: prompt.options.stop.clone(),
        stream_header_timeout: Some(context.idle_timeout),
        stream_read_timeout: Some(context.idle_timeout),
        capture_usage: Some(true),
        capture_tool_calls: Some(!context.sends_increments()),
        raw_frame_sink: context.sends_increments().then_some(increments),
        ..ChatOptions::default()
    };
    if verbatim_name {
        // `genai` cuts what stands before `::` off a name, and an effort behind it, as in
        // `phi-4-mini-high`. A budget, which OpenAI's protocol has no field for, stops the second;
        // the field set last undoes the first.
        options.reasoning_effort = Some(ReasoningEffort::Budget(0));
        options.extra_body = Some(json!({ "model": context.model }));
    }
    options
}

fn messages(drafts: Vec<Draft>, kind: AdapterKind) -> Result<Vec<ChatMessage>> {
    let mut messages: Vec<ChatMessage> = Vec::with_capacity(drafts.len());
    for draft in drafts {
        let Some(role) = role(&draft.role) else {
            continue;
        };
        match role {
            ChatRole::System => {
                let text = draft.content.text();
                if !text.is_empty() {
                    messages.push(ChatMessage::system(text));
                }
            }
            ChatRole::User => messages.push(ChatMessage::user(user_parts(draft.content, kind))),
            ChatRole::Assistant => {
                let parts = assistant_parts(draft)?;
                // Providers refuse an answer that says nothing.
                if !parts.is_empty() {
                    messages.push(ChatMessage::assistant(MessageContent::from_parts(parts)));
                }
            }
            ChatRole::Tool => {
                let mut response =
                    ToolResponse::new(draft.tool_call_id.unwrap_or_default(), draft.content.text());
                response.fn_name = draft.name;
                // Some protocols take the results of parallel calls in one message only. The
                // others get them one by one from `genai`.
                match messages.last_mut() {
                    Some(last) if last.role == ChatRole::Tool => last.content.push(response),
                    _ => messages.push(ChatMessage::from(response)),
                }
            }
        }
    }
    Ok(messages)
}

/// Who speaks, to a model; nobody that it knows if `None`.
fn role(role: &Role) -> Option<ChatRole> {
    match role.known()? {
        Role::System => Some(ChatRole::System),
        Role::User => Some(ChatRole::User),
        Role::Assistant => Some(ChatRole::Assistant),
        Role::Tool => Some(ChatRole::Tool),
        Role::Other(_) => None,
    }
}

fn user_parts(content: Content, kind: AdapterKind) -> MessageContent {
    let parts = match content {
        Content::Text(text) => return MessageContent::from_text(text),
        Content::Parts(parts) => parts,
    };
    let is_data = |part: &Part| matches!(part, Part::ImageUrl { .. } | Part::InlineData { .. });
    if !parts.iter().any(is_data) {
        // Joined here: `genai` would put blank lines between them.
        return MessageContent::from_text(Content::Parts(parts).text());
    }
    let parts: Vec<ContentPart> = parts
        .into_iter()
        .filter_map(|part| user_part(part, kind))
        .collect();
    MessageContent::from_parts(parts)
}

/// A piece of a user's message; `None` where a model has no use for it.
fn user_part(part: Part, kind: AdapterKind) -> Option<ContentPart> {
    match part {
        Part::Text(text) => (!text.is_empty()).then_some(ContentPart::Text(text)),
        Part::Json(json) => {
            let text: String = serde_json::from_str(json.as_str()).ok()?;
            (!text.is_empty()).then_some(ContentPart::Text(text))
        }
        Part::ImageUrl { url, detail: _ } => Some(image(url, kind)),
        Part::InlineData { media_type, data } => {
            let extension = media_type.rsplit('/').next().unwrap_or("bin");
            let name = format!("attachment.{extension}");
            let data = message::base64(&data);
            Some(Binary::from_base64(media_type, data, Some(name)).into())
        }
    }
}

fn image(url: String, kind: AdapterKind) -> ContentPart {
    // A data URL holds the image, which every protocol can carry.
    let inline = url
        .strip_prefix("data:")
        .and_then(|rest| rest.split_once(";base64,"))
        .map(|(media_type, data)| {
            let media_type = media_type.split(';').next().unwrap_or_default();
            Binary::from_base64(media_type, data, None)
        });
    if let Some(inline) = inline {
        return inline.into();
    }
    if matches!(kind, AdapterKind::Anthropic | AdapterKind::MiniMax) {
        // `genai` would leave the image out and only log it.
        let data = json!({"type": "image", "source": {"type": "url", "url": url}});
        return ContentPart::Custom(CustomPart {
            model_iden: None,
            data,
        });
    }
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let media_type = match path.rsplit('.').next() {
        Some("png") => "image/png",
        Some("gif") => "image/gif",
        Some("webp") => "image/webp",
        _ => "image/jpeg",
    };
    Binary::from_url(media_type, url, None).into()
}

fn assistant_parts(draft: Draft) -> Result<Vec<ContentPart>> {
    let mut parts = Vec::with_capacity(1 + draft.tool_calls.len());
    let text = draft.content.text();
    if !text.is_empty() {
        parts.push(ContentPart::Text(text));
    }
    for call in draft.tool_calls {
        parts.push(ContentPart::ToolCall(ToolCall {
            call_id: call.id,
            fn_name: call.name,
            // What Python can store and a `Value` cannot hold must not end every further turn.
            fn_arguments: value(&call.arguments)
                .unwrap_or_else(|_| json!({"json": call.arguments.shown()})),
            thought_signatures: None,
        }));
    }
    Ok(parts)
}

fn tool(tool: model::Tool) -> Result<Tool> {
    let schema = match &tool.parameters {
        Some(parameters) => value(parameters)?,
        None => json!({"type": "object", "properties": {}}),
    };
    // OpenAI refuses a description of `null`, which is what `genai` makes of none.
    let description = tool.description.unwrap_or_default();
    Ok(Tool::new(tool.name)
        .with_description(description)
        .with_schema(schema))
}

fn value(json: &Json) -> Result<Value> {
    serde_json::from_str(json.as_str())
        .map_err(|_| Error::Rejected("JSON in the conversation is nested too deep".to_owned()))
}
