//! A model that is none: it repeats what it was told, word by word, so that everything can be
//! tried and tested without a provider.

use async_trait::async_trait;
use futures_util::{StreamExt as _, stream};

use super::{End, Error, FinishReason, Model, Piece, Pieces, Prompt, Result};
use crate::message::{Role, Usage};

/// Its name, which is also its only model's.
pub const NAME: &str = "echo";

/// Answers with the last message it was given.
#[derive(Debug, Default)]
pub struct Echo;

#[async_trait]
impl Model for Echo {
    async fn answer(&self, prompt: Prompt) -> Result<Pieces> {
        if let Some(model) = prompt.model
            && model != NAME
        {
            return Err(Error::UnknownModel(model));
        }
        let said = prompt.messages.last().map(|message| {
            let text = message.content.text();
            match message.role {
                Role::Tool => format!("The tool says: {text}"),
                _ => format!("You said: {text}"),
            }
        });
        let answer = said.unwrap_or_default();
        let words: Vec<String> = answer.split_inclusive(' ').map(str::to_owned).collect();
        let input: usize = prompt
            .messages
            .iter()
            .map(|message| message.content.text().split_whitespace().count())
            .sum();
        let usage = Usage {
            input_tokens: input as i64,
            output_tokens: words.len() as i64,
            total_tokens: (input + words.len()) as i64,
        };
        let end = Piece::End(End {
            finish_reason: FinishReason::Stop,
            usage: Some(usage),
            tool_calls: Vec::new(),
        });
        let pieces = words.into_iter().map(Piece::Text).chain([end]).map(Ok);
        // A pause between the words would only slow tests down; a yield lets each be sent alone.
        let pieces = stream::iter(pieces).then(|piece| async {
            tokio::task::yield_now().await;
            piece
        });
        Ok(pieces.boxed())
    }

    fn default_model(&self) -> &str {
        NAME
    }

    fn describe(&self) -> String {
        "echo (no model: repeats what it is told; set --model to have one)".to_owned()
    }
}
