//! Which messages of a history a model is given. Knows neither stores nor models.

use crate::message::{Content, Draft, Message, Role};

/// Chooses from the newest messages of a session, oldest first, what a model can be given: a
/// window that does not begin with a tool result, whose call is outside of it, and nothing that
/// says nothing.
pub fn choose(newest: Vec<Message>) -> Vec<Draft> {
    let is_result = |draft: &Draft| draft.role == Role::Tool;
    let drafts = newest.into_iter().map(|message| message.draft);
    drafts
        .skip_while(is_result)
        .filter(says_something)
        .collect()
}

fn says_something(draft: &Draft) -> bool {
    let is_empty = match &draft.content {
        Content::Text(text) => text.is_empty(),
        Content::Parts(parts) => parts.is_empty(),
    };
    !is_empty || !draft.tool_calls.is_empty() || draft.role == Role::Tool
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(role: Role, text: &str) -> Message {
        Message::new(Draft::text(role, text), "id".into(), 1)
    }

    #[test]
    fn a_window_never_begins_with_a_tool_result() {
        let newest = vec![
            stored(Role::Tool, "1"),
            stored(Role::Tool, "2"),
            stored(Role::Assistant, "three"),
            stored(Role::Tool, "4"),
        ];
        let texts: Vec<_> = choose(newest)
            .iter()
            .map(|draft| draft.content.text())
            .collect();
        assert_eq!(texts, ["three", "4"]);
    }

    #[test]
    fn empty_messages_are_left_out_but_empty_results_are_not() {
        let newest = vec![
            stored(Role::User, "a"),
            stored(Role::Assistant, ""),
            stored(Role::Tool, ""),
        ];
        let roles: Vec<_> = choose(newest).into_iter().map(|draft| draft.role).collect();
        assert_eq!(roles, [Role::User, Role::Tool]);
    }
}
