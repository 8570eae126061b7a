//! What OpenAI's protocol demands of the messages of a request. A provider refuses others, with
//! HTTP 400.

use serde_json::Value;

/// Says which rule the messages of a request break first.
pub fn check(messages: &[Value]) -> Result<(), String> {
    let mut waiting: Vec<&str> = Vec::new();
    let mut has_begun = false;
    for (index, message) in messages.iter().enumerate() {
        let role = message["role"].as_str().ok_or("a message without a role")?;
        if role == "tool" {
            let id = message["tool_call_id"].as_str().unwrap_or_default();
            let call = waiting.iter().position(|call| *call == id);
            let call = call.ok_or_else(|| format!("[{index}]: no call waits for {id:?}"))?;
            waiting.remove(call);
            continue;
        }
        if !waiting.is_empty() {
            return Err(format!("[{index}]: the calls {waiting:?} have no result"));
        }
        let calls = message["tool_calls"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        match role {
            "system" => continue,
            "user" => has_begun = true,
            "assistant" if !has_begun => {
                return Err(format!("[{index}]: it begins with an assistant message"));
            }
            "assistant" => {
                let says = message["content"]
                    .as_str()
                    .is_some_and(|text| !text.is_empty());
                if !says && calls.is_empty() {
                    return Err(format!("[{index}]: an assistant message that says nothing"));
                }
            }
            other => return Err(format!("[{index}]: the role {other:?}")),
        }
        waiting = calls
            .iter()
            .map(|call| call["id"].as_str().unwrap_or_default())
            .collect();
    }
    match waiting[..] {
        [] => Ok(()),
        _ => Err(format!("the calls {waiting:?} have no result")),
    }
}
