//! Which messages of a history a model is given: a window that a model accepts. Does no I/O and
//! knows neither stores nor models.
//!
//! A window begins at a user message and goes to the end of the history. An exchange is a question,
//! which is one user message or several in a row, and all that follows up to the next. What is
//! left out of a window, wherever it stands:
//!
//! - messages that cannot be read, that say nothing, or whose role no model knows;
//! - tool calls that are not answered in full by the results that follow them at once, together
//!   with those; results that answer no such call.
//!
//! Of the session's system messages, those at its very beginning come before every window; whoever
//! reads the history adds them. Others stand in the exchange before them.

use std::collections::HashMap;

use crate::message::{Content, Draft, Message, Role, Violation};

/// A message of a history, as far as a window is concerned.
#[derive(Debug, Clone)]
pub struct Entry<S> {
    /// What it is to whoever reads the history.
    pub source: S,
    /// `None` if it cannot be read.
    pub message: Option<Message>,
    /// 0 where tokens are not counted.
    pub tokens: usize,
    pub bytes: usize,
}

impl<S> Entry<S> {
    /// The message, if a model can be given it, and who speaks to the model.
    fn said(&self) -> Option<(Role, &Draft)> {
        self.message
            .as_ref()
            .and_then(|message| said(&message.draft))
    }

    /// Whether the message leaves the beginning of a session to the system: `None` where there is
    /// nothing for a model.
    pub fn is_system(&self) -> Option<bool> {
        self.said().map(|(role, _)| role == Role::System)
    }
}

fn said(draft: &Draft) -> Option<(Role, &Draft)> {
    let role = draft.role.known()?;
    let says_something = match role {
        Role::Tool => true,
        // What no model of ours knows may be what another one is asked.
        Role::User => match &draft.content {
            Content::Text(text) => !text.is_empty(),
            Content::Parts(parts) => !parts.is_empty(),
        },
        _ => !draft.tool_calls.is_empty() || !draft.content.text().is_empty(),
    };
    says_something.then_some((role, draft))
}

/// How large a window may be. The smallest bound decides.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Exchanges at most.
    pub turns: Option<usize>,
    /// Only of the newest so many messages; but the newest exchange comes whole.
    pub messages: Option<usize>,
    /// Tokens at most.
    pub tokens: Option<usize>,
    /// Tokens of what comes besides the window, which count too.
    pub tokens_besides: usize,
    pub bytes: usize,
}

/// What a window is for.
#[derive(Debug, Clone, Copy)]
pub enum Purpose<'a> {
    /// To be read. The newest exchange is always in it.
    Reading,
    /// To be sent before these messages, which are the newest exchange; or which belong to it, if
    /// they are the results of the last calls. Then it is always in, with the results there are.
    Asking(&'a [Draft]),
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// The window, by the places of its messages.
    Window(Window),
    /// More of the history must be known. What there is otherwise; `None` without the whole newest
    /// exchange.
    Unclear(Option<Window>),
    /// The newest exchange alone takes so many tokens, with what comes besides.
    TooManyTokens(usize),
    /// The newest exchange alone is above [`Bounds::bytes`].
    TooManyBytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Window {
    /// Where its messages are among the entries.
    pub places: Vec<usize>,
    pub tokens: usize,
    /// Whether [`Bounds::bytes`] made it smaller.
    pub is_cut_by_bytes: bool,
}

/// Chooses a window of the newest messages of a session, oldest first. `is_whole`: these are all.
pub fn choose<S>(
    entries: &[Entry<S>],
    is_whole: bool,
    bounds: &Bounds,
    purpose: Purpose<'_>,
) -> Choice {
    let history = History::new(entries, purpose);
    let Some(newest) = history.newest_exchange(is_whole, purpose) else {
        return Choice::Unclear(None);
    };
    let (mut tokens, mut bytes) = history.cost(newest..entries.len());
    tokens += bounds.tokens_besides;
    if bounds.tokens.is_some_and(|max| tokens > max) {
        return Choice::TooManyTokens(tokens);
    }
    if bytes > bounds.bytes {
        return Choice::TooManyBytes;
    }

    let window = |start: usize, is_cut_by_bytes| {
        let places: Vec<usize> = (start..entries.len())
            .filter(|place| history.kept[*place])
            .collect();
        Window {
            tokens: places.iter().map(|place| entries[*place].tokens).sum(),
            places,
            is_cut_by_bytes,
        }
    };
    let mut start = newest;
    let mut turns = usize::from(newest < entries.len());
    // Back over the messages at which it may begin, while they fit.
    for end in (0..newest).rev() {
        let (of_tokens, of_bytes) = history.cost(end..end + 1);
        tokens += of_tokens;
        bytes += of_bytes;
        let is_user = history.is_user(end);
        // The earlier messages of a question that is in already begin no further turn.
        let turns_from_here = match is_user && !history.is_user_before(start) {
            true => turns + 1,
            false => turns.max(usize::from(is_user)),
        };
        let is_above = |max: Option<usize>, count: usize| max.is_some_and(|max| count > max);
        if bytes > bounds.bytes {
            return Choice::Window(window(start, true));
        }
        if is_above(bounds.tokens, tokens)
            || is_above(bounds.messages, entries.len() - end)
            || is_above(bounds.turns, turns_from_here) && is_user
        {
            return Choice::Window(window(start, false));
        }
        if is_user {
            start = end;
            turns = turns_from_here;
        }
    }
    let is_full = bounds.messages.is_some_and(|max| entries.len() >= max)
        || bounds.turns == Some(turns) && history.begins_exchange(start);
    match is_whole || is_full {
        true => Choice::Window(window(start, false)),
        false => Choice::Unclear(Some(window(start, false))),
    }
}

/// A history with what of it can be sent.
struct History<'a, S> {
    entries: &'a [Entry<S>],
    kept: Vec<bool>,
    /// For each message that can be sent, the place of the one before it.
    before: Vec<Option<usize>>,
    /// The call whose results are to come.
    asked: Option<usize>,
    /// Whether there are new results, and what comes before them is further back.
    is_open: bool,
}

impl<'a, S> History<'a, S> {
    fn new(entries: &'a [Entry<S>], purpose: Purpose<'_>) -> Self {
        let new = match purpose {
            Purpose::Reading => &[][..],
            Purpose::Asking(new) => new,
        };
        let stored = entries.iter().enumerate().filter_map(|(place, entry)| {
            let (role, draft) = entry.said()?;
            Some((Some(place), role, draft))
        });
        let new = new.iter().filter_map(|draft| {
            let (role, draft) = said(draft)?;
            Some((None, role, draft))
        });
        let said: Vec<(Option<usize>, Role, &Draft)> = stored.chain(new).collect();

        let mut kept = vec![false; entries.len()];
        let mut before = vec![None; entries.len()];
        let mut asked = None;
        for pair in said.windows(2) {
            if let Some(place) = pair[1].0 {
                before[place] = pair[0].0;
            }
        }
        let mut index = 0;
        while let Some((place, role, draft)) = said.get(index) {
            index += 1;
            if *role == Role::Tool {
                continue;
            }
            let mut of_exchange = vec![*place];
            // By their ids, which some providers leave empty.
            let mut waiting: HashMap<&str, usize> = HashMap::new();
            for call in &draft.tool_calls {
                *waiting.entry(&call.id).or_default() += 1;
            }
            let mut unanswered = draft.tool_calls.len();
            let calls = unanswered > 0;
            let mut goes_on = false;
            while calls && let Some((place, Role::Tool, result)) = said.get(index) {
                index += 1;
                goes_on |= place.is_none();
                let id = result.tool_call_id.as_deref().unwrap_or_default();
                if let Some(calls @ 1..) = waiting.get_mut(id) {
                    *calls -= 1;
                    unanswered -= 1;
                    of_exchange.push(*place);
                }
            }
            if goes_on {
                asked = *place;
            }
            if unanswered == 0 || goes_on {
                for place in of_exchange.into_iter().flatten() {
                    kept[place] = true;
                }
            }
        }
        let first_new = said.iter().find(|(place, ..)| place.is_none());
        let is_open = matches!(first_new, Some((_, Role::Tool, _)))
            && !said
                .iter()
                .any(|(place, role, _)| place.is_some() && *role != Role::Tool);
        Self {
            entries,
            kept,
            before,
            asked,
            is_open,
        }
    }

    fn is_user(&self, place: usize) -> bool {
        let role = self.entries[place].said().map(|(role, _)| role);
        role == Some(Role::User)
    }

    /// Whether a user message comes directly before the one at this place.
    fn is_user_before(&self, place: usize) -> bool {
        let before = self.before.get(place).copied().flatten();
        before.is_some_and(|before| self.is_user(before))
    }

    /// Whether the message at this place is known to begin an exchange.
    fn begins_exchange(&self, place: usize) -> bool {
        let before = self.before.get(place).copied().flatten();
        before.is_some_and(|before| !self.is_user(before))
    }

    /// Where the exchange begins that is never left out; behind the end if it is none of these.
    /// `None` if that is not known.
    fn newest_exchange(&self, is_whole: bool, purpose: Purpose<'_>) -> Option<usize> {
        let end = self.entries.len();
        let within = match (purpose, self.asked) {
            (Purpose::Reading, _) => end,
            (Purpose::Asking(_), Some(call)) => call,
            (Purpose::Asking(_), None) if self.is_open && !is_whole => return None,
            (Purpose::Asking(_), None) => return Some(end),
        };
        let Some(mut start) = (0..within).rev().find(|place| self.is_user(*place)) else {
            // Nobody has asked. Of calls that wait, the results must still get there.
            return is_whole.then_some(self.asked.unwrap_or(end));
        };
        while let Some(before) = self.before[start] {
            if !self.is_user(before) {
                return Some(start);
            }
            start = before;
        }
        // What comes before it may be of the same question.
        is_whole.then_some(start)
    }

    /// Tokens and bytes of what can be sent of these.
    fn cost(&self, places: std::ops::Range<usize>) -> (usize, usize) {
        let kept = places.filter(|place| self.kept[*place]);
        kept.fold((0, 0), |(tokens, bytes), place| {
            let entry = &self.entries[place];
            (tokens + entry.tokens, bytes + entry.bytes)
        })
    }
}

/// Refuses tool results that a model could not be given after this history: they come before all else
/// that is new, name calls of the last answer that have no result yet, and leave none of those out.
pub fn check_results<S>(history: &[Entry<S>], new: &[Draft]) -> Result<(), Violation> {
    let mut answered: Vec<&str> = Vec::new();
    let mut calls: Vec<&str> = Vec::new();
    for (role, draft) in history.iter().rev().filter_map(Entry::said) {
        if role != Role::Tool {
            calls.extend(draft.tool_calls.iter().map(|call| call.id.as_str()));
            break;
        }
        answered.extend(draft.tool_call_id.as_deref());
    }
    // One for one: some providers give several calls of an answer the same id, or none.
    for id in answered {
        if let Some(found) = calls.iter().position(|call| *call == id) {
            calls.remove(found);
        }
    }
    let first = new.iter().take_while(|draft| draft.role == Role::Tool);
    let first = first.count();
    for (index, draft) in new.iter().enumerate() {
        if draft.role != Role::Tool {
            continue;
        }
        if index > first {
            let rule = "is a tool result, which must come before the messages of other roles";
            return Err(Violation::new(format!("messages[{index}]"), rule));
        }
        let id = draft.tool_call_id.as_deref().unwrap_or_default();
        match calls.iter().position(|call| *call == id) {
            Some(found) => drop(calls.remove(found)),
            None => {
                let field = format!("messages[{index}].tool_call_id");
                let rule = "must name a tool call of the session's last answer that has no result";
                return Err(Violation::new(field, rule));
            }
        }
    }
    if first > 0 && !calls.is_empty() {
        let rule =
            "must have a result for each tool call of the session's last answer that has none";
        return Err(Violation::new("messages", rule));
    }
    Ok(())
}
