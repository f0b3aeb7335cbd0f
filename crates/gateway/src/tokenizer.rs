//! Text to token ids and back, as the checkpoint's `tokenizer.json` says.
//!
//! **Control tokens.** A raw prompt is taken as `transformers` takes it: `<|im_start|>` in it is the control token,
//! and none are added. In a conversation only the template may write control tokens: a user who types
//! `<|im_end|>` gets its letters and stays inside the turn. To that end every character of a message that could
//! begin a control token is swapped for a stand-in (a Unicode noncharacter) while the template is rendered and
//! control tokens are looked for, and swapped back before the text is cut into ordinary tokens; so a message
//! without control tokens becomes exactly the ids that rendering and encoding it in one go gives.
//!
//! **Sizes.** The trained vocabulary must fit into the model's embedding, or [`Tokenizer::check`] fails at start-up.
//! Tokens added later may lie above it (Yi-1.5 counts 64,003 against 64,000 rows): a request that would send one is
//! refused with the token's name. Rows without a token are padding, and stand for no text.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use tokenizers::tokenizer::{
    AddedToken, Model, NormalizedString, OffsetType, PreTokenizedString, PreTokenizer,
    Result as LibraryResult,
};

use crate::chat::{ChatTemplate, Message, PromptError};
use crate::detokenize::Detokenizer;
use crate::files::{self, TokenizerConfig, TokenizerError};
use crate::pieces::Pieces;

/// Ends a turn in ChatML.
const TURN_END: &str = "<|im_end|>";
/// The first of 32 noncharacters in a row, which stand for the beginnings of control tokens.
const STAND_INS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// The tokenizer, chat template and end tokens of a checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    library: tokenizers::Tokenizer,
    pieces: Pieces,
    template: Option<ChatTemplate>,
    stop_ids: Vec<u32>,
    /// Special tokens, and added tokens that the template spells: no message may write them.
    control: HashMap<u32, String>,
    /// The characters that control tokens begin with, and what stands for them.
    stand_ins: Vec<(char, char)>,
    /// One more than the highest id.
    size: u32,
    /// The same without added tokens.
    trained_size: u32,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they exist, `tokenizer_config.json`, `chat_template.jinja` and
    /// `generation_config.json` of a checkpoint's folder.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let mut config = TokenizerConfig::read(folder)?;
        let mut library = files::read_tokenizer(folder)?;
        let malformed = |reason| TokenizerError::Malformed { path: folder.join("tokenizer.json"), reason };
        library.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        library.with_padding(None);
        let (bos, eos) = (config.take_bos(), config.take_eos());
        mark_special(&mut library, &config, [&bos, &eos]).map_err(|error| malformed(error.to_string()))?;
        let pieces = Pieces::new(library.get_decoder()).map_err(malformed)?;

        let eos_id = eos.as_deref().and_then(|token| library.token_to_id(token));
        let source = files::read_template(folder)?.or_else(|| config.take_template());
        let template = source.map(|source| ChatTemplate::new(source, bos, eos));
        let mut stop_ids = files::read_eos_ids(folder)?;
        if let Some(template) = &template {
            stop_ids.extend(eos_id);
            let turn_end = template.source().contains(TURN_END).then(|| library.token_to_id(TURN_END));
            stop_ids.extend(turn_end.flatten());
        }
        stop_ids.sort_unstable();
        stop_ids.dedup();

        let control = control_tokens(&library, template.as_ref());
        let starts = starts(&control);
        if starts.len() > STAND_INS.count() {
            return Err(malformed(format!("its special tokens begin in {} ways", starts.len())));
        }
        let stand_ins = starts.into_iter().zip(STAND_INS).collect();
        let (size, trained_size) = (size(&library, true), size(&library, false));
        Ok(Self { library, pieces, template, stop_ids, control, stand_ins, size, trained_size })
    }

    /// Checks that the tokenizer and a model with so many embedding rows belong together.
    pub fn check(&self, vocabulary: u32) -> Result<(), TokenizerError> {
        if self.trained_size > vocabulary {
            return Err(TokenizerError::TooLarge { tokens: self.trained_size, vocabulary });
        }
        Ok(())
    }

    /// One more than the highest token id.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Ids that end an answer, besides those of the model's own configuration.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// Whether conversations can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The token of an id as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.library.id_to_token(id)
    }

    /// Encodes a text as it stands: special tokens that it spells are recognised, none are added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let encoding = self.library.encode_fast(text, false).map_err(tokenizer_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Renders a conversation with the chat template and encodes it; messages can not write control tokens.
    pub fn encode_conversation(&self, messages: &[Message]) -> Result<Vec<u32>, PromptError> {
        let template = self.template.as_ref().ok_or(PromptError::NoTemplate)?;
        let masked = messages.iter().enumerate().map(|(index, message)| self.mask(index, message));
        let text = template.render(&masked.collect::<Result<Vec<_>, _>>()?)?;
        self.encode_masked(&text).map_err(tokenizer_error)
    }

    /// Decodes a whole text; characters that are not whole become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let mut detokenizer = Detokenizer::default();
        let mut text: String =
            ids.iter().map(|&id| detokenizer.push(&self.piece(id, skip_special_tokens))).collect();
        text.push_str(&detokenizer.finish());
        self.pieces.strip_start(&mut text);
        text
    }

    /// The bytes that a token adds to a text: none for an id without a token.
    pub fn piece(&self, id: u32, skip_special_tokens: bool) -> Vec<u8> {
        let added = self.library.get_added_vocabulary();
        match added.simple_id_to_token(id).or_else(|| self.library.get_model().id_to_token(id)) {
            Some(token) if !(skip_special_tokens && added.is_special_token(&token)) => {
                self.pieces.bytes(&token)
            }
            _ => Vec::new(),
        }
    }

    /// Swaps the characters that could begin a control token for their stand-ins.
    fn mask(&self, index: usize, message: &Message) -> Result<Message, PromptError> {
        if let Some(reserved) = message.content.chars().find(|c| STAND_INS.contains(c)) {
            return Err(PromptError::Noncharacter { index, code: reserved.into() });
        }
        let mask = |c| self.stand_ins.iter().find(|pair| pair.0 == c).map_or(c, |pair| pair.1);
        Ok(Message { role: message.role.clone(), content: message.content.chars().map(mask).collect() })
    }

    fn unmask(&self, c: char) -> char {
        self.stand_ins.iter().find(|pair| pair.1 == c).map_or(c, |pair| pair.0)
    }

    /// The library's own steps, with the stand-ins swapped back after control tokens were looked for.
    fn encode_masked(&self, text: &str) -> LibraryResult<Vec<u32>> {
        let library = &self.library;
        let mut splits: PreTokenizedString =
            library.get_added_vocabulary().extract_and_normalize(library.get_normalizer(), text);
        splits.normalize(|split| {
            split.map(|c| self.unmask(c));
            Ok(())
        })?;
        if let Some(pre_tokenizer) = library.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut splits)?;
        }
        splits.tokenize(|split| {
            let tokens = library.get_model().tokenize(split.get())?;
            self.refuse_control(split, tokens.iter().map(|token| token.id))?;
            Ok(tokens)
        })?;
        Ok(splits.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
    }

    /// Some models find control tokens in plain text by themselves; that is no way out of a turn either.
    fn refuse_control(
        &self,
        split: &NormalizedString,
        mut ids: impl Iterator<Item = u32>,
    ) -> LibraryResult<()> {
        let spelled = ids.find_map(|id| self.control.get(&id).filter(|token| split.get().contains(*token)));
        spelled.map_or(Ok(()), |token| Err(format!("a message spells the control token {token}").into()))
    }
}

fn tokenizer_error(error: impl std::fmt::Display) -> PromptError {
    PromptError::Tokenizer(error.to_string())
}

/// Tokens are special where either file says so; the configuration has no say over ids.
fn mark_special(
    library: &mut tokenizers::Tokenizer,
    config: &TokenizerConfig,
    named: [&Option<String>; 2],
) -> LibraryResult<()> {
    let declared =
        config.added_tokens_decoder.values().filter(|token| token.special).map(|token| &token.content);
    let special: HashSet<&String> = declared.chain(named.into_iter().flatten()).collect();
    let known = library.get_added_tokens_decoder();
    let marked = special.into_iter().filter(|token| library.token_to_id(token).is_some()).map(|content| {
        let known = known.values().find(|token| token.content == *content).cloned();
        known.unwrap_or_else(|| AddedToken::from(content.as_str(), true)).special(true)
    });
    let marked: Vec<AddedToken> = marked.collect();
    library.add_special_tokens(marked).map(|_| ())
}

fn control_tokens(library: &tokenizers::Tokenizer, template: Option<&ChatTemplate>) -> HashMap<u32, String> {
    let spelled =
        |token: &AddedToken| template.is_some_and(|template| template.source().contains(&token.content));
    let added = library.get_added_tokens_decoder().into_iter();
    added
        .filter(|(_, token)| token.special || spelled(token))
        .map(|(id, token)| (id, token.content))
        .collect()
}

fn starts(control: &HashMap<u32, String>) -> Vec<char> {
    let mut starts: Vec<char> = control.values().filter_map(|token| token.chars().next()).collect();
    starts.sort_unstable();
    starts.dedup();
    starts
}

fn size(library: &tokenizers::Tokenizer, with_added_tokens: bool) -> u32 {
    library.get_vocab(with_added_tokens).into_values().max().map_or(0, |id| id.saturating_add(1))
}
