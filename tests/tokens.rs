//! Counting tokens: the same as tiktoken, in bounded time.

use chat_memory::{
    message::{Content, Draft, Json, Part, Role, ToolCall},
    tokens::{PRIMING, Tokenizer},
};
use proptest::prelude::*;

const BOTH: [Tokenizer; 2] = [Tokenizer::Cl100k, Tokenizer::O200k];

/// OpenAI's own count.
fn expected(tokenizer: Tokenizer, text: &str) -> usize {
    let known = match tokenizer {
        Tokenizer::Cl100k => tiktoken_rs::cl100k_base_singleton(),
        Tokenizer::O200k => tiktoken_rs::o200k_base_singleton(),
    };
    known.count_ordinary(text)
}

/// From the OpenAI cookbook, "How to count tokens with tiktoken".
#[test]
fn published_texts_take_the_published_tokens() {
    for (text, cl100k, o200k) in [
        ("tiktoken is great!", 6, 6),
        ("antidisestablishmentarianism", 6, 6),
        ("2 + 2 = 4", 7, 7),
        ("お誕生日おめでとう", 9, 8),
        ("", 0, 0),
    ] {
        let counts = BOTH.map(|tokenizer| tokenizer.count(text));
        assert_eq!(counts, [cl100k, o200k], "{text:?}");
    }
}

/// The same, `example_messages`: what the API itself says, 129 for gpt-4 and 124 for gpt-4o.
#[test]
fn a_published_prompt_takes_what_the_provider_says() {
    let named = |name: &str, text: &str| Draft {
        name: Some(name.to_owned()),
        ..Draft::text(Role::System, text)
    };
    let prompt = [
        Draft::text(
            Role::System,
            "You are a helpful, pattern-following assistant that translates corporate jargon into \
             plain English.",
        ),
        named(
            "example_user",
            "New synergies will help drive top-line growth.",
        ),
        named(
            "example_assistant",
            "Things working well together will increase revenue.",
        ),
        named(
            "example_user",
            "Let's circle back when we have more bandwidth to touch base on opportunities for \
             increased leverage.",
        ),
        named(
            "example_assistant",
            "Let's talk later when we're less busy about how to do better.",
        ),
        Draft::text(
            Role::User,
            "This late pivot means we don't have time to boil the ocean for the client deliverable.",
        ),
    ];
    let counts = ["gpt-4", "gpt-4o"].map(|model| {
        let tokenizer = Tokenizer::of_model(model);
        let messages = prompt.iter().map(|m| tokenizer.count_message(m));
        PRIMING + messages.sum::<usize>()
    });
    assert_eq!(counts, [129, 124]);
}

#[test]
fn models_have_their_tokenizers_and_unknown_ones_the_newest() {
    let cl100k = [
        "gpt-4",
        "gpt-4-turbo",
        "gpt-4-0613",
        "gpt-3.5-turbo",
        "gpt-35-turbo",
        "openai/gpt-4",
        "openai::gpt-4-32k",
        "ft:gpt-3.5-turbo:me::1",
    ];
    for model in cl100k {
        assert_eq!(Tokenizer::of_model(model), Tokenizer::Cl100k, "{model}");
    }
    let o200k = [
        "gpt-4o",
        "gpt-4.1-mini",
        "gpt-4.5-preview",
        "gpt-5",
        "o3",
        "claude-opus-4",
        "",
        "x",
        "ft:gpt-4o-mini:me::1",
    ];
    for model in o200k {
        assert_eq!(Tokenizer::of_model(model), Tokenizer::O200k, "{model}");
    }
}

#[test]
fn calls_names_and_parts_count_and_what_is_not_sent_does_not() {
    let tokenizer = Tokenizer::O200k;
    let count = |draft: &Draft| tokenizer.count_message(draft);
    let plain = Draft::text(Role::Assistant, "hello");
    assert_eq!(count(&plain), 3 + 1 + 1);
    let mut draft = plain.clone();
    draft.reasoning = Some("long thoughts".to_owned());
    draft.metadata = Some(Json::parse("metadata", r#"{"a": 1}"#).unwrap());
    assert_eq!(count(&draft), count(&plain));
    let arguments = r#"{"city": "Paris"}"#;
    draft.tool_calls = vec![ToolCall {
        id: "call_1".to_owned(),
        name: "weather".to_owned(),
        arguments: Json::parse("arguments", arguments).unwrap(),
    }];
    let of_call = 3 + tokenizer.count("weather") + tokenizer.count(arguments);
    assert_eq!(count(&draft), count(&plain) + of_call);

    let image = |detail: Option<&str>| Part::ImageUrl {
        url: "https://example.com/a-very-long-name-of-an-image.png".to_owned(),
        detail: detail.map(str::to_owned),
    };
    let parts = vec![
        Part::Text("hello".to_owned()),
        image(None),
        image(Some("low")),
        Part::InlineData {
            media_type: "image/png".to_owned(),
            data: vec![0; 100_000].into(),
        },
        Part::Json(Json::parse("json", r#"{"type": "thinking", "thinking": "…"}"#).unwrap()),
        Part::Json(Json::parse("json", r#""hello""#).unwrap()),
    ];
    let user = Draft {
        content: Content::Parts(parts),
        ..Draft::text(Role::User, "")
    };
    assert_eq!(count(&user), 3 + 1 + 1 + 765 + 85 + 765 + 1);
}

/// tiktoken-rs takes long for these, and panics at some: the counts are of its merges by hand.
#[test]
fn long_runs_are_counted_as_short_ones_are() {
    // A million would take long without optimizations.
    let length: usize = 1 << 16;
    for (text, cl100k, o200k) in [
        ("a", length / 8, length / 8),
        (" ", length / 128, length / 128),
        ("\n", length / 32, length / 16),
        ("7", length.div_ceil(3), length.div_ceil(3)),
    ] {
        let counts = BOTH.map(|tokenizer| tokenizer.count(&text.repeat(length)));
        assert_eq!(counts, [cl100k, o200k], "{text:?}");
    }
}

#[test]
fn a_long_word_is_the_same_over_the_seams_of_its_chunks() {
    let mut state = 1_u32;
    for letters in [2, 4, 26] {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            char::from(b'a' + (state >> 24) as u8 % letters)
        };
        let word: String = (0..20_000).map(next).collect();
        for tokenizer in BOTH {
            assert_eq!(tokenizer.count(&word), expected(tokenizer, &word));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_text_takes_what_tiktoken_says(
        pieces in prop::collection::vec(
            prop_oneof![
                4 => prop::sample::select(vec![
                    "a", "Hello", " world", "'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "\u{a0}",
                    "\u{3000}", "123", "4", "!", "?", "//", "_", "{\"a\":", "e\u{301}", "Ж", "的",
                    "👩‍👧", "ǅ", "ʰ", "\u{85}", "ſ", "<|endoftext|>", "٣", "Ⅷ", "\u{0}",
                ]).prop_map(str::to_owned),
                1 => "\\PC{1,8}",
                1 => any::<char>().prop_map(String::from),
            ],
            0..24,
        ),
    ) {
        let text = pieces.concat();
        for tokenizer in BOTH {
            prop_assert_eq!(tokenizer.count(&text), expected(tokenizer, &text), "{:?}", text);
        }
    }
}
