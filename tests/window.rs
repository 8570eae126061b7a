//! Windows: what they hold and what they do not, on histories of every kind. How they are read from
//! a store is tested through the service, in windows.rs.

mod harness;

use chat_memory::{
    message::{Content, Draft, Json, Message, Role, ToolCall},
    window::{Bounds, Choice, Entry, Purpose, Window, check_results, choose},
};
use harness::rules;
use proptest::prelude::*;
use serde_json::{Value, json};

const NONE: Bounds = Bounds {
    turns: None,
    messages: None,
    tokens: None,
    tokens_besides: 0,
    bytes: usize::MAX,
};

fn draft(role: Role, text: &str) -> Draft {
    Draft::text(role, text)
}

fn user(text: &str) -> Draft {
    draft(Role::User, text)
}

fn answer(text: &str) -> Draft {
    draft(Role::Assistant, text)
}

fn calls(ids: &[&str]) -> Draft {
    let call = |id: &&str| ToolCall {
        id: (*id).to_owned(),
        name: "tool".to_owned(),
        arguments: Json::parse("arguments", "{}").unwrap(),
    };
    Draft {
        tool_calls: ids.iter().map(call).collect(),
        ..answer("")
    }
}

fn result(id: &str) -> Draft {
    Draft {
        tool_call_id: Some(id.to_owned()),
        ..draft(Role::Tool, id)
    }
}

/// Entries of so many tokens, by their places.
fn entries(drafts: &[Option<Draft>], tokens: &[usize]) -> Vec<Entry<()>> {
    let entry = |(place, draft): (usize, &Option<Draft>)| Entry {
        source: (),
        message: draft
            .clone()
            .map(|draft| Message::new(draft, "id".to_owned(), 1)),
        tokens: tokens[place % tokens.len()],
        bytes: 1,
    };
    drafts.iter().enumerate().map(entry).collect()
}

fn history(drafts: &[Draft]) -> Vec<Entry<()>> {
    let drafts: Vec<_> = drafts.iter().cloned().map(Some).collect();
    entries(&drafts, &[1])
}

fn places(choice: Choice) -> Vec<usize> {
    match choice {
        Choice::Window(window) => window.places,
        other => panic!("no window: {other:?}"),
    }
}

fn read(drafts: &[Draft], bounds: Bounds) -> Vec<usize> {
    places(choose(&history(drafts), true, &bounds, Purpose::Reading))
}

fn ask(drafts: &[Draft], bounds: Bounds, new: &[Draft]) -> Vec<usize> {
    places(choose(
        &history(drafts),
        true,
        &bounds,
        Purpose::Asking(new),
    ))
}

fn turns(turns: usize) -> Bounds {
    Bounds {
        turns: Some(turns),
        ..NONE
    }
}

fn messages(messages: usize) -> Bounds {
    Bounds {
        messages: Some(messages),
        ..NONE
    }
}

fn tokens(tokens: usize) -> Bounds {
    Bounds {
        tokens: Some(tokens),
        ..NONE
    }
}

#[test]
fn turns_count_questions_and_a_question_may_be_several_messages() {
    let drafts = [
        user("a"),
        answer("b"),
        user("c"),
        user("d"),
        answer("e"),
        answer("f"),
        user("g"),
    ];
    assert_eq!(read(&drafts, turns(1)), [6]);
    assert_eq!(read(&drafts, turns(2)), [2, 3, 4, 5, 6]);
    assert_eq!(read(&drafts, turns(3)), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(read(&drafts, turns(9)), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(ask(&drafts, turns(1), &[user("new")]), [6]);
    assert_eq!(ask(&drafts[..6], turns(1), &[user("new")]), [2, 3, 4, 5]);
}

#[test]
fn an_older_question_may_be_cut_and_the_newest_may_not() {
    let drafts = [user("a"), user("b"), answer("c"), user("d"), user("e")];
    assert_eq!(read(&drafts, tokens(4)), [1, 2, 3, 4]);
    assert_eq!(read(&drafts, tokens(3)), [3, 4]);
    let choice = choose(&history(&drafts), true, &tokens(1), Purpose::Reading);
    assert_eq!(choice, Choice::TooManyTokens(2));
    // A number of messages never drops it.
    assert_eq!(read(&drafts, messages(1)), [3, 4]);
    // New messages are the newest exchange; so nothing of the history must be.
    assert_eq!(ask(&drafts, messages(1), &[user("new")]), [4]);
    assert_eq!(ask(&drafts, tokens(0), &[user("new")]), [0; 0]);
}

#[test]
fn a_call_is_in_with_all_its_results_or_out_with_those_it_has() {
    let drafts = [
        user("a"),
        calls(&["1", "2"]),
        result("2"),
        result("1"),
        calls(&["3", "4"]),
        result("3"),
        answer("b"),
    ];
    assert_eq!(read(&drafts, NONE), [0, 1, 2, 3, 6]);
    // The results must follow at once.
    let parted = [
        user("a"),
        calls(&["1"]),
        draft(Role::System, "s"),
        result("1"),
    ];
    assert_eq!(read(&parted, NONE), [0, 2]);
    // At the end, too.
    assert_eq!(read(&drafts[..6], NONE), [0, 1, 2, 3]);
}

#[test]
fn results_without_their_call_are_left_out() {
    let drafts = [
        result("0"),
        user("a"),
        result("0"),
        calls(&["1"]),
        result("1"),
        result("1"),
        result("2"),
        answer("b"),
    ];
    assert_eq!(read(&drafts, NONE), [1, 3, 4, 7]);
}

#[test]
fn calls_without_ids_are_counted() {
    let two = [user("a"), calls(&["", ""]), result(""), result("")];
    assert_eq!(read(&two, NONE), [0, 1, 2, 3]);
    assert_eq!(read(&two[..3], NONE), [0]);
}

#[test]
fn new_results_keep_their_call_and_its_exchange() {
    let drafts = [
        user("a"),
        answer("b"),
        user("c"),
        calls(&["1"]),
        result("1"),
        calls(&["2", "3"]),
        result("2"),
    ];
    let new = [result("3")];
    assert_eq!(ask(&drafts, messages(1), &new), [2, 3, 4, 5, 6]);
    assert_eq!(ask(&drafts, turns(1), &new), [2, 3, 4, 5, 6]);
    assert_eq!(ask(&drafts, turns(2), &new).len(), 7);
    let choice = choose(&history(&drafts), true, &tokens(4), Purpose::Asking(&new));
    assert_eq!(choice, Choice::TooManyTokens(5));
    // With the results that are given, and with no other.
    assert_eq!(ask(&drafts[..6], NONE, &new), [0, 1, 2, 3, 4, 5]);
    assert!(check_results(&history(&drafts), &new).is_ok());
    assert!(check_results(&history(&drafts), &[result("2")]).is_err());
    // Whoever asks something else has left the calls alone.
    assert_eq!(ask(&drafts, NONE, &[user("new")]), [0, 1, 2, 3, 4]);
}

#[test]
fn new_results_come_first_and_answer_all_calls_that_wait() {
    let stored = [user("a"), calls(&["1", "2", ""]), result("2")];
    let refused = |stored: &[Draft], new: &[Draft]| {
        let checked = check_results(&history(stored), new);
        checked
            .err()
            .map_or(String::new(), |violation| violation.field)
    };
    let (one, none) = (result("1"), result(""));
    assert_eq!(refused(&stored, &[one.clone(), none.clone()]), "");
    assert_eq!(
        refused(&stored, &[none.clone(), one.clone(), user("b")]),
        ""
    );
    assert_eq!(refused(&stored, &[user("b")]), "");
    assert_eq!(refused(&stored, std::slice::from_ref(&one)), "messages");
    assert_eq!(refused(&stored, &[one.clone(), user("b")]), "messages");
    let late = [one.clone(), user("b"), none.clone()];
    assert_eq!(refused(&stored, &late), "messages[2]");
    let behind = [user("b"), one.clone(), none.clone()];
    assert_eq!(refused(&stored, &behind), "messages[1]");
    let twice = [one.clone(), one.clone()];
    assert_eq!(refused(&stored, &twice), "messages[1].tool_call_id");
    // What no model is given parts no result from its call.
    let parted = [&stored[..], &[draft(Role::Other("function".into()), "x")]].concat();
    assert_eq!(refused(&parted, &[one.clone(), none.clone()]), "");
    let parted = [&stored[..], &[draft(Role::System, "s")]].concat();
    assert_eq!(refused(&parted, &[one, none]), "messages[0].tool_call_id");
}

#[test]
fn without_a_question_there_is_no_window_but_for_results() {
    let drafts = [draft(Role::System, "s"), answer("hello"), calls(&["1"])];
    assert_eq!(read(&drafts, NONE), [0; 0]);
    assert_eq!(ask(&drafts, NONE, &[user("new")]), [0; 0]);
    assert_eq!(ask(&drafts, NONE, &[result("1")]), [2]);
}

#[test]
fn what_no_model_knows_is_as_if_it_were_not_there() {
    let other = |role: &str| draft(Role::Other(role.to_owned()), "x");
    let drafts = [
        other("human"),
        other("function"),
        other("remove"),
        answer(""),
        user(""),
        user("b"),
        other("ai"),
        Draft {
            content: Content::Parts(Vec::new()),
            ..user("")
        },
    ];
    assert_eq!(read(&drafts, NONE), [0, 5, 6]);
    // The question is both: nothing comes between them that counts.
    assert_eq!(read(&drafts, turns(1)), [0, 5, 6]);
    let unreadable = entries(&[None, Some(user("a")), None], &[1]);
    let choice = choose(&unreadable, true, &NONE, Purpose::Reading);
    assert_eq!(places(choice), [1]);
}

#[test]
fn bytes_cut_where_others_do_and_say_so() {
    let drafts = [user("a"), answer("b"), user("c"), answer("d")];
    let bounds = |bytes| Bounds { bytes, ..NONE };
    let choice = choose(&history(&drafts), true, &bounds(3), Purpose::Reading);
    let window = Window {
        places: vec![2, 3],
        tokens: 2,
        is_cut_by_bytes: true,
    };
    assert_eq!(choice, Choice::Window(window));
    let choice = choose(&history(&drafts), true, &bounds(1), Purpose::Reading);
    assert_eq!(choice, Choice::TooManyBytes);
}

// -------------------------------------------------------------------------------------------------
// Random histories

/// A message, as OpenAI's protocol has it.
fn shown(draft: &Draft) -> Value {
    let role = draft.role.known().expect("a known role");
    let calls = draft.tool_calls.iter().map(|call| json!({"id": call.id}));
    json!({
        "role": role.name(),
        "content": draft.content.text(),
        "tool_calls": calls.collect::<Vec<_>>(),
        "tool_call_id": draft.tool_call_id,
    })
}

/// Messages that stand together in real histories, and oddities.
fn piece() -> impl Strategy<Value = Vec<Option<Draft>>> {
    let ids = || prop::collection::vec(prop::sample::select(vec!["1", "2", "3", ""]), 1..4);
    let exchange = (ids(), any::<bool>()).prop_map(|(ids, has_answer)| {
        let results = ids.iter().map(|id| result(id));
        let mut drafts = vec![user("question"), calls(&ids)];
        drafts.extend(results);
        drafts.extend(has_answer.then(|| answer("answer")));
        drafts.into_iter().map(Some).collect()
    });
    let other = |role: &str| draft(Role::Other(role.to_owned()), "x");
    let single = prop::sample::select(vec![
        Some(user("u")),
        Some(user("u")),
        Some(answer("a")),
        Some(answer("a")),
        Some(draft(Role::System, "s")),
        Some(answer("")),
        Some(other("function")),
        Some(other("human")),
        None,
    ]);
    prop_oneof![
        3 => exchange,
        4 => single.prop_map(|draft| vec![draft]),
        1 => ids().prop_map(|ids| vec![Some(calls(&ids))]),
        1 => ids().prop_map(|ids| ids.iter().map(|id| Some(result(id))).collect()),
    ]
}

fn random_history() -> impl Strategy<Value = Vec<Entry<()>>> {
    let drafts = prop::collection::vec(piece(), 0..16).prop_map(|pieces| pieces.concat());
    let tokens = prop::collection::vec(1..9_usize, 1..20);
    (drafts, tokens).prop_map(|(drafts, tokens)| entries(&drafts, &tokens))
}

fn random_bounds() -> impl Strategy<Value = Bounds> {
    let bound = |max: usize| prop::option::of(0..max);
    let turns = prop::option::of(1..5_usize);
    let messages = prop::option::of(1..30_usize);
    (turns, messages, bound(120), 0..9_usize).prop_map(|(turns, messages, tokens, besides)| {
        Bounds {
            turns,
            messages,
            tokens,
            tokens_besides: besides,
            bytes: usize::MAX,
        }
    })
}

/// New messages that suit a history: a question, or the results that its last calls wait for.
fn new_messages(history: &[Entry<()>], wants_results: bool) -> Vec<Draft> {
    let mut answered: Vec<Draft> = Vec::new();
    let mut results: Vec<Draft> = Vec::new();
    for draft in history
        .iter()
        .rev()
        .filter_map(|entry| Some(&entry.message.as_ref()?.draft))
    {
        if draft.role == Role::Assistant {
            results.extend(draft.tool_calls.iter().map(|call| result(&call.id)));
            break;
        }
        answered.push(draft.clone());
    }
    for draft in answered {
        if let Some(place) = results.iter().position(|result| *result == draft) {
            results.remove(place);
        }
    }
    if check_results(history, &results).is_err() {
        results.clear();
    }
    match wants_results && !results.is_empty() {
        true => results,
        false => vec![user("new")],
    }
}

fn is_user(entry: &Entry<()>) -> bool {
    let message = entry.message.as_ref();
    message.is_some_and(|m| m.draft.role.known() == Some(Role::User))
}

/// All windows that begin at a user message, oldest first, and how many turns each has: written
/// plainly, without regard to cost.
fn largest(
    history: &[Entry<()>],
    kept: &[usize],
    bounds: &Bounds,
    fits_anyway: usize,
) -> Vec<usize> {
    for start in 0..history.len() {
        if start >= fits_anyway || !is_user(&history[start]) {
            continue;
        }
        let places: Vec<usize> = kept
            .iter()
            .copied()
            .filter(|place| *place >= start)
            .collect();
        let tokens: usize = places.iter().map(|place| history[*place].tokens).sum();
        // Questions: user messages, of those that can be sent or read, that follow no other.
        let said: Vec<&Entry<()>> = history[start..]
            .iter()
            .filter(|entry| entry.is_system().is_some())
            .collect();
        let turns = (0..said.len())
            .filter(|index| is_user(said[*index]) && (*index == 0 || !is_user(said[index - 1])))
            .count();
        let fits = |max: Option<usize>, count: usize| max.is_none_or(|max| count <= max);
        if fits(bounds.tokens, tokens + bounds.tokens_besides)
            && fits(bounds.turns, turns)
            && fits(bounds.messages, history.len() - start)
        {
            return places;
        }
    }
    kept.iter()
        .copied()
        .filter(|place| *place >= fits_anyway)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn every_window_is_accepted_and_the_largest_that_fits(
        history in random_history(),
        bounds in random_bounds(),
        is_asking: bool,
        wants_results: bool,
    ) {
        let new = new_messages(&history, wants_results);
        let purpose = if is_asking { Purpose::Asking(&new) } else { Purpose::Reading };
        let has_results = is_asking && new[0].role == Role::Tool;
        let choice = choose(&history, true, &bounds, purpose);

        // All that can be sent, from the first question on.
        let everything = choose(&history, true, &NONE, purpose);
        let Choice::Window(everything) = everything else { panic!("{everything:?}") };
        let user_at = |from: usize| (0..from).rev().find(|place| is_user(&history[*place]));
        // Where the newest exchange begins.
        let newest = match is_asking {
            true if !has_results => history.len(),
            _ => {
                let mut start = match has_results {
                    true => {
                        let call = history.iter().rposition(|entry| {
                            let message = entry.message.as_ref();
                            message.is_some_and(|m| !m.draft.tool_calls.is_empty())
                        });
                        user_at(call.unwrap()).unwrap_or(call.unwrap())
                    }
                    false => user_at(history.len()).unwrap_or(history.len()),
                };
                while start < history.len() && is_user(&history[start]) {
                    let said = (0..start).rev().find(|p| history[*p].is_system().is_some());
                    match said {
                        Some(said) if is_user(&history[said]) => start = said,
                        _ => break,
                    }
                }
                start
            }
        };
        let of_newest = everything.places.iter().filter(|place| **place >= newest);
        let needed: usize = of_newest.map(|place| history[*place].tokens).sum();
        let needed = needed + bounds.tokens_besides;
        if bounds.tokens.is_some_and(|max| needed > max) {
            prop_assert_eq!(choice, Choice::TooManyTokens(needed));
            return Ok(());
        }
        let Choice::Window(window) = choice else { panic!("{choice:?}") };
        let expected = largest(&history, &everything.places, &bounds, newest);
        prop_assert_eq!(&window.places, &expected);
        let tokens: usize = window.places.iter().map(|place| history[*place].tokens).sum();
        prop_assert_eq!(window.tokens, tokens);

        // A model accepts it.
        let drafts = window.places.iter().map(|place| &history[*place].message.as_ref().unwrap().draft);
        let after = if is_asking { &new[..] } else { &[] };
        let sent: Vec<Value> = drafts.chain(after).map(shown).collect();
        let has_question = sent.iter().any(|message| message["role"] == "user");
        if has_question {
            prop_assert_eq!(rules::check(&sent), Ok(()), "{:?}", sent);
        } else {
            prop_assert!(has_results || sent.is_empty());
        }
    }

    #[test]
    fn a_window_is_the_same_however_much_of_the_history_is_known(
        history in random_history(),
        bounds in random_bounds(),
        is_asking: bool,
        wants_results: bool,
    ) {
        let new = new_messages(&history, wants_results);
        let purpose = if is_asking { Purpose::Asking(&new) } else { Purpose::Reading };
        let whole = choose(&history, true, &bounds, purpose);
        for from in 0..=history.len() {
            let known = choose(&history[from..], false, &bounds, purpose);
            match (known, &whole) {
                (Choice::Unclear(_), _) => {}
                (Choice::Window(known), Choice::Window(whole)) => {
                    let known: Vec<usize> = known.places.iter().map(|place| place + from).collect();
                    prop_assert_eq!(&known, &whole.places, "from {}", from);
                }
                (known, whole) => prop_assert_eq!(&known, whole, "from {}", from),
            }
        }
    }
}
