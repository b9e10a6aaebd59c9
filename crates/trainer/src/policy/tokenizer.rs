//! One token a byte, and one for the end: the tokenizer of the tiny policies, and its `tokenizer.json` for mistral.rs.

/// The token that ends an answer.
pub const END: u32 = 256;
/// Tokens in the vocabulary: all bytes and the end, filled up to a multiple of 8.
pub const VOCABULARY: usize = 264;
/// How the end is written.
const END_TEXT: &str = "<|end|>";

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tokenizer;

impl Tokenizer {
    /// Returns a text's tokens: its bytes.
    #[must_use]
    pub fn encode(self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    /// Returns the text of tokens up to the end; what is no UTF-8 is replaced.
    #[must_use]
    pub fn decode(self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().map_while(|token| u8::try_from(*token).ok()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Returns the character that stands for a byte in a byte-level vocabulary (GPT-2's table): printable bytes stand for themselves, the
/// others for characters from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        char::from(byte)
    } else {
        let shift = (0..byte).filter(|b| !printable(*b)).count();
        u32::try_from(shift).ok().and_then(|shift| char::from_u32(0x100 + shift)).unwrap_or('\u{fffd}')
    }
}

/// Returns `tokenizer.json`: byte-pair encoding without a single merge, byte-level before and after.
pub(super) fn tokenizer_json() -> serde_json::Value {
    let mut vocabulary: serde_json::Map<String, serde_json::Value> =
        (0..=255_u8).map(|byte| (byte_char(byte).to_string(), byte.into())).collect();
    vocabulary.insert(END_TEXT.to_owned(), END.into());
    for spare in END as usize + 1..VOCABULARY {
        vocabulary.insert(format!("<|spare-{spare}|>"), spare.into());
    }
    let byte_level = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    serde_json::json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": END, "content": END_TEXT, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": [],
        },
    })
}

/// Returns `tokenizer_config.json`. The chat template passes contents on as they are: a prompt is what a policy reads.
pub(super) fn tokenizer_config_json() -> serde_json::Value {
    serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_TEXT,
        "eos_token": END_TEXT,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "clean_up_tokenization_spaces": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let characters: std::collections::BTreeSet<char> = (0..=255).map(byte_char).collect();
        assert_eq!(characters.len(), 256);
        // The space and the newline of GPT-2's table.
        assert_eq!((byte_char(b' '), byte_char(b'\n'), byte_char(b'A')), ('Ġ', 'Ċ', 'A'));
    }

    #[test]
    fn text_survives_and_stops_at_the_end() {
        let mut tokens = Tokenizer.encode("17+5=");
        tokens.extend([END, 65]);
        assert_eq!(Tokenizer.decode(&tokens), "17+5=");
    }
}
