//! How many tokens a model takes for a message: OpenAI's tokenizers, and what its chat format adds.
//! Does no I/O and knows neither stores nor models.
//!
//! A text is cut into pieces by a pattern, and each piece into tokens by byte-pair encoding: the
//! two neighbours that together are the token of the lowest rank are merged, until none are. That
//! is done here in about linear time. tiktoken-rs, OpenAI's own library
//! in Rust, takes seconds for some texts of 1 MiB and panics at others; `bpe-openai` is linear, but
//! adds 49 MB to the program and 49 MB of memory for each tokenizer. The tokens themselves are
//! tiktoken-rs's (`build.rs` writes them), and tests compare the counts with its own.

use std::{cmp::Reverse, collections::BinaryHeap, io::Read as _, sync::LazyLock};

use flate2::read::ZlibDecoder;
use regex::Regex;
use rustc_hash::FxHashMap;

use crate::message::{Content, Draft, Part};

/// Tokens that a prompt takes besides its messages: they begin the answer.
///
/// This and the next two are what OpenAI documents for its models since gpt-3.5-turbo-0613, in the
/// cookbook, "How to count tokens with tiktoken", `num_tokens_from_messages`.
pub const PRIMING: usize = 3;
/// Tokens that a message takes besides its texts.
const PER_MESSAGE: usize = 3;
/// Tokens that a name takes besides itself.
const PER_NAME: usize = 1;
/// Tokens that a tool call takes besides its name and arguments. OpenAI does not document it: it
/// counts as what sets a message apart.
const PER_CALL: usize = 3;
/// Tokens of an image, and of any other data: those of an image of 1024 × 1024 pixels with high
/// detail, of which OpenAI documents 170 for each of four tiles, and 85.
const PER_IMAGE: usize = 4 * 170 + 85;
/// Tokens of an image with low detail, whatever its size.
const PER_LOW_IMAGE: usize = 85;

/// A tokenizer of OpenAI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tokenizer {
    /// GPT-4o and all that came later.
    O200k,
    /// GPT-3.5 and GPT-4.
    Cl100k,
}

impl Tokenizer {
    /// The tokenizer of a model, by the provider's name for it. Of models whose tokenizer is not
    /// known, [`Tokenizer::O200k`]: what others have cuts texts much alike.
    pub fn of_model(model: &str) -> Self {
        // `openai/gpt-4`, `openai::gpt-4`, `ft:gpt-4-0613:org::id`
        let model = model.strip_prefix("ft:").unwrap_or(model);
        let is_old = |name: &str| {
            let later = ["gpt-4o", "gpt-4.", "gpt-4-o"];
            let old = ["gpt-4", "gpt-3.5", "gpt-35"];
            let begins_with = |known: &&str| name.starts_with(*known);
            old.iter().any(begins_with) && !later.iter().any(begins_with)
        };
        match model.split(['/', ':']).any(is_old) {
            true => Self::Cl100k,
            false => Self::O200k,
        }
    }

    /// Its name, as tiktoken has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::O200k => "o200k_base",
            Self::Cl100k => "cl100k_base",
        }
    }

    /// How many tokens a text takes. The names of special tokens are texts like any other.
    ///
    /// Takes about 0.1 seconds for 1 MiB, and for the first text the time to load the tokens.
    pub fn count(self, text: &str) -> usize {
        if text.is_empty() {
            return 0;
        }
        static O200K: LazyLock<Encoding> =
            LazyLock::new(|| Encoding::load(O200K_TOKENS, &O200K_PIECES.join("|")));
        static CL100K: LazyLock<Encoding> =
            LazyLock::new(|| Encoding::load(CL100K_TOKENS, &CL100K_PIECES.join("|")));
        match self {
            Self::O200k => O200K.count(text),
            Self::Cl100k => CL100K.count(text),
        }
    }

    /// How many tokens a message takes in a prompt: its role, name, texts, images and tool calls,
    /// and what sets messages apart. Not its reasoning and metadata, which are not sent, and not
    /// pieces that no model knows.
    pub fn count_message(self, message: &Draft) -> usize {
        let content = match &message.content {
            Content::Text(text) => self.count(text),
            Content::Parts(parts) => parts.iter().map(|part| self.count_part(part)).sum(),
        };
        let name = |name: &String| PER_NAME + self.count(name);
        let calls = message
            .tool_calls
            .iter()
            .map(|call| PER_CALL + self.count(&call.name) + self.count(&call.arguments.shown()));
        PER_MESSAGE
            + self.count(message.role.name())
            + message.name.as_ref().map_or(0, name)
            + content
            + calls.sum::<usize>()
    }

    fn count_part(self, part: &Part) -> usize {
        match part {
            Part::ImageUrl {
                detail: Some(detail),
                ..
            } if detail == "low" => PER_LOW_IMAGE,
            Part::ImageUrl { .. } | Part::InlineData { .. } => PER_IMAGE,
            Part::Text(_) | Part::Json(_) => part.text().map_or(0, |text| self.count(&text)),
        }
    }
}

static O200K_TOKENS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/o200k_base.tokens"));
static CL100K_TOKENS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cl100k_base.tokens"));

/// tiktoken's patterns, but for spaces: instead of `\s+(?!\S)|\s+` there is `\s+` only, and
/// [`Encoding::pieces`] gives back the last one. This way no pattern looks ahead, and all take linear time.
const O200K_PIECES: [&str; 6] = [
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+",
];
const CL100K_PIECES: [&str; 6] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+",
];

/// Bytes of a piece that are encoded at once.
const CHUNK_BYTES: usize = 4 << 10;
/// Seams that may turn out to be none before a piece is encoded at once.
const RETRIES_MAX: usize = 64;

/// Tokens and patterns of one tokenizer.
struct Encoding {
    /// The table is fixed, so nobody can fill it with collisions.
    ranks: FxHashMap<&'static [u8], u32>,
    longest: usize,
    pattern: Regex,
}

impl Encoding {
    fn load(packed: &[u8], pattern: &str) -> Self {
        let mut tokens = Vec::new();
        let unpacked = ZlibDecoder::new(packed).read_to_end(&mut tokens);
        unpacked.expect("tokens that are tested");
        // For good, as the tables that refer to it.
        let mut tokens: &'static [u8] = Box::leak(tokens.into_boxed_slice());
        let mut ranks = FxHashMap::default();
        let mut longest = 0;
        while let Some((length, rest)) = tokens.split_first() {
            let (token, rest) = rest.split_at(usize::from(*length));
            ranks.insert(token, ranks.len() as u32);
            longest = longest.max(token.len());
            tokens = rest;
        }
        ranks.shrink_to_fit();
        Self {
            ranks,
            longest,
            pattern: Regex::new(pattern).expect("a pattern that is tested"),
        }
    }

    fn count(&self, text: &str) -> usize {
        self.pieces(text)
            .map(|piece| self.count_piece(piece.as_bytes()))
            .sum()
    }

    /// Cuts a text into the pieces that are tokenized alone.
    fn pieces<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let mut end = self.pattern.find_at(text, start)?.end();
            let piece = &text[start..end];
            // Spaces before a word leave the last one to it. Only the last pattern ends with one.
            let last = piece.chars().next_back()?;
            let is_space = last.is_whitespace() && !matches!(last, '\r' | '\n');
            if is_space && end < text.len() && piece.len() > last.len_utf8() {
                end -= last.len_utf8();
            }
            let piece = &text[start..end];
            start = end;
            Some(piece)
        })
    }

    fn rank(&self, bytes: &[u8]) -> Option<u32> {
        if bytes.len() > self.longest {
            return None;
        }
        self.ranks.get(bytes).copied()
    }

    /// Counts the tokens of a piece.
    ///
    /// A long one is encoded chunk by chunk, for a heap of all of it would be slow. Tokens are the
    /// encoding of their bytes if each two neighbours are the encoding of theirs (see the crate
    /// `bpe`, whose algorithms rest on it). Those within a chunk are; so only the two at a seam are
    /// looked at. The end of a chunk is encoded once more with what follows it.
    fn count_piece(&self, piece: &[u8]) -> usize {
        if self.rank(piece).is_some() {
            return 1;
        }
        let mut ends = vec![0];
        let mut retries = 0;
        loop {
            let start = ends[ends.len() - 1];
            let chunk = &piece[start..piece.len().min(start + CHUNK_BYTES)];
            let tokens = self.encode(chunk);
            if let [.., before, _] = ends[..] {
                let seam = &piece[before..start + tokens[0]];
                if self.encode(seam) != [start - before, seam.len()] {
                    // The seam is none in the encoding of all. It was never seen so far back.
                    ends.pop();
                    retries += 1;
                    if retries == RETRIES_MAX {
                        return self.encode(piece).len();
                    }
                    continue;
                }
            }
            if start + chunk.len() == piece.len() {
                return ends.len() - 1 + tokens.len();
            }
            let kept = tokens.len() - tokens.len() / 4;
            ends.extend(tokens[..kept].iter().map(|end| start + end));
        }
    }

    /// Encodes a piece: the ends of its tokens. Each part is known by its first byte; `next` and
    /// `previous` say where its neighbours begin.
    fn encode(&self, piece: &[u8]) -> Vec<usize> {
        let length = piece.len();
        let mut next: Vec<usize> = (1..=length).collect();
        let mut previous: Vec<usize> = (0..=length).map(|start| start.wrapping_sub(1)).collect();
        // A part and the one after it, with where they end, by the rank of both as one token.
        let candidate = |start: usize, end: usize| {
            let rank = self.rank(&piece[start..end])?;
            Some(Reverse((rank, start, end)))
        };
        let mut merges: BinaryHeap<_> = (2..=length)
            .filter_map(|end| candidate(end - 2, end))
            .collect();
        while let Some(Reverse((_, start, end))) = merges.pop() {
            // Either of the two may have been merged with another since.
            let middle = next[start];
            if middle >= end || next[middle] != end {
                continue;
            }
            next[start] = end;
            next[middle] = usize::MAX;
            previous[end] = start;
            if end < length {
                merges.extend(candidate(start, next[end]));
            }
            if start > 0 {
                merges.extend(candidate(previous[start], end));
            }
        }
        let ends = std::iter::successors(next.first(), |end| next.get(**end));
        ends.copied().collect()
    }
}
