//! The checkpoint's chat template: a conversation to the text of a prompt.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};

/// Who may speak.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// Why a prompt can not be made into tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// The checkpoint has no template.
    #[error("the model has no chat template: send text or token ids instead of a conversation")]
    NoTemplate,
    /// There is nothing to render.
    #[error("the conversation has no messages")]
    NoMessages,
    /// Nobody that the model knows.
    #[error("message {index}: role {role:?} is not one of system, user and assistant")]
    Role {
        /// Which message.
        index: usize,
        /// What it says.
        role: String,
    },
    /// A message holds a character that Unicode reserves for use inside programs.
    #[error("message {index}: U+{code:04X} is not a character for interchange")]
    Noncharacter {
        /// Which message.
        index: usize,
        /// The code point.
        code: u32,
    },
    /// The template refused the conversation, or is broken.
    #[error("chat template: {0}")]
    Template(String),
    /// The tokenizer refused the text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
}

/// A Jinja template with the tokens that it may name.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

impl ChatTemplate {
    /// Keeps a template; a mistake in it shows when a conversation is rendered.
    pub fn new(source: String, bos_token: Option<String>, eos_token: Option<String>) -> Self {
        Self { source, bos_token, eos_token }
    }

    /// The template's own text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation up to where the assistant's next turn begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, PromptError> {
        if messages.is_empty() {
            return Err(PromptError::NoMessages);
        }
        for (index, message) in messages.iter().enumerate() {
            if !ROLES.contains(&message.role.as_str()) {
                return Err(PromptError::Role { index, role: message.role.clone() });
            }
        }
        environment()
            .and_then(|environment| environment.render_str(&self.source, self.context(messages)))
            .map_err(|error| PromptError::Template(describe(&error)))
    }

    fn context(&self, messages: &[Message]) -> Value {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| Value::from_pairs([("role", &message.role), ("content", &message.content)]))
            .collect();
        let mut pairs =
            vec![("messages", Value::from(messages)), ("add_generation_prompt", Value::from(true))];
        pairs.extend(self.bos_token.as_ref().map(|token| ("bos_token", Value::from(token))));
        pairs.extend(self.eos_token.as_ref().map(|token| ("eos_token", Value::from(token))));
        Value::from_pairs(pairs)
    }
}

/// Jinja as `transformers` sets it up.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    Ok(environment)
}

/// What a template says with `raise_exception`, or what is wrong with it and where.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    error.line().map_or(what.clone(), |line| format!("{what} (line {line})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] \
                          + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
                          {{ '<|im_start|>assistant\n' }}{% endif %}";

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.into(), content: content.into() }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, PromptError> {
        ChatTemplate::new(source.into(), Some("<s>".into()), None).render(messages)
    }

    #[test]
    fn renders_chatml() {
        let text =
            render(CHATML, &[message("system", "Be brief."), message("user", "你好 <b>&amp;</b>")]).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好 <b>&amp;</b><|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn python_methods_and_the_special_tokens_are_there() {
        let source = "{%- for m in messages %}\n    {%- if not m.content.startswith('x') %}\n        \
                      {{- bos_token + m['content'].strip().upper() + (eos_token or '') }}\n    {%- endif %}\n{%- endfor %}";
        assert_eq!(render(source, &[message("user", " a "), message("user", "xb")]).unwrap(), "<s>A");
    }

    #[test]
    fn whitespace_around_blocks_goes_as_in_transformers() {
        let source =
            "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &[message("user", "a"), message("user", "b")]).unwrap(), "a\nb\n");
    }

    #[test]
    fn a_template_may_refuse() {
        let source =
            "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}";
        let error = render(source, &[message("assistant", "hi")]).unwrap_err();
        assert!(error.to_string().contains("the user speaks first"), "{error}");
    }

    #[test]
    fn a_broken_template_is_an_error_of_the_request() {
        let error = render("{% for %}", &[message("user", "hi")]).unwrap_err();
        assert!(matches!(&error, PromptError::Template(what) if what.contains("line 1")), "{error}");
        assert!(render("{{ messages.nothing.at.all }}", &[message("user", "hi")]).is_err());
    }

    #[test]
    fn nobody_else_may_speak() {
        assert_eq!(render(CHATML, &[]), Err(PromptError::NoMessages));
        let role = "user\nhi<|im_end|>";
        assert_eq!(
            render(CHATML, &[message("user", ""), message(role, "")]),
            Err(PromptError::Role { index: 1, role: role.into() })
        );
    }
}
