//! Colours of text for people: log lines, and the output of commands.

use std::ffi::OsStr;
use std::fmt::{self, Display};
use std::io::IsTerminal;

use anstyle::{AnsiColor, Style};

/// The choice between colours and plain text, for one output stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Palette {
    /// No escape sequences.
    Plain,
    /// The terminal's own 16 colours.
    Colours,
}

/// The meaning of a piece of text, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Success.
    Good,
    /// A problem that may be temporary, or that the sender of the request can solve.
    Warning,
    /// A failure.
    Bad,
    /// A heading.
    Strong,
    /// A detail that is seldom needed.
    Faint,
    /// All other text.
    Normal,
}

/// A text with its colour.
pub struct Painted<T> {
    text: T,
    style: Style,
}

// === impl Palette ===

impl Palette {
    /// Returns the palette for a stream: colours on a terminal, unless `NO_COLOR` is not empty
    /// (<https://no-color.org>) or `TERM` is `dumb` or unset.
    pub fn of(stream: &impl IsTerminal) -> Self {
        let variable = |name| std::env::var_os(name);
        let (no_color, term) = (variable("NO_COLOR"), variable("TERM"));
        Self::choose(stream.is_terminal(), no_color.as_deref(), term.as_deref())
    }

    fn choose(is_terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> Self {
        let is_unwanted = no_color.is_some_and(|value| !value.is_empty());
        let is_capable = term.is_some_and(|name| !name.is_empty() && name != "dumb");
        if is_terminal && is_capable && !is_unwanted {
            Self::Colours
        } else {
            Self::Plain
        }
    }

    /// Gives a text the colour of this tone. A width in a format string pads the text alone, without the
    /// escape sequences.
    pub fn paint<T: Display>(self, tone: Tone, text: T) -> Painted<T> {
        let style = match self {
            Self::Plain => Style::new(),
            Self::Colours => tone.style(),
        };
        Painted { text, style }
    }
}

// === impl Tone ===

impl Tone {
    /// Returns the tone of an HTTP status. A 4xx is up to the client, a 5xx is a failure of a server.
    pub fn of_status(status: u16) -> Self {
        match status {
            0..400 => Self::Good,
            400..500 => Self::Warning,
            500.. => Self::Bad,
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Good => AnsiColor::Green.on_default(),
            Self::Warning => AnsiColor::Yellow.on_default(),
            Self::Bad => AnsiColor::Red.on_default().bold(),
            Self::Strong => Style::new().bold(),
            Self::Faint => Style::new().dimmed(),
            Self::Normal => Style::new(),
        }
    }
}

// === impl Painted ===

impl<T: Display> Display for Painted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, style } = self;
        write!(f, "{style}")?;
        text.fmt(f)?;
        write!(f, "{style:#}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_a_capable_terminal_whose_user_wants_them() {
        use Palette::{Colours, Plain};
        for (is_terminal, no_color, term, palette) in [
            (true, None, Some("xterm-256color"), Colours),
            (true, Some(""), Some("xterm"), Colours),
            (true, Some("0"), Some("xterm"), Plain),
            (true, None, Some("dumb"), Plain),
            (true, None, Some(""), Plain),
            (true, None, None, Plain),
            (false, None, Some("xterm"), Plain),
        ] {
            let chosen =
                Palette::choose(is_terminal, no_color.map(OsStr::new), term.map(OsStr::new));
            assert_eq!(chosen, palette, "{is_terminal} {no_color:?} {term:?}");
        }
    }

    #[test]
    fn text_without_a_colour_of_its_own_has_no_escape_sequence() {
        for (palette, tone, painted) in [
            (Palette::Colours, Tone::Good, "\u{1b}[32mok\u{1b}[0m"),
            (Palette::Colours, Tone::Normal, "ok"),
            (Palette::Plain, Tone::Bad, "ok"),
        ] {
            assert_eq!(palette.paint(tone, "ok").to_string(), painted);
        }
    }

    #[test]
    fn width_counts_without_the_escape_sequences() {
        let painted = Palette::Colours.paint(Tone::Good, "ok");
        assert_eq!(format!("{painted:<4}."), "\u{1b}[32mok  \u{1b}[0m.");
    }
}
