//! The line of a request for people, shortened to the width of the terminal.

use std::borrow::Cow;

use crate::style::{Palette, Tone};

/// The parts of the line of a request.
#[derive(Clone)]
pub(super) struct RequestLine {
    pub(super) time: String,
    /// HTTP status, or three characters in its place.
    pub(super) status: String,
    /// Outcome of the request.
    pub(super) tone: Tone,
    pub(super) method: Option<String>,
    pub(super) path: String,
    pub(super) duration: Option<String>,
    /// Error with advice, or another message.
    pub(super) hint: Option<String>,
    /// True if the hint is worth more than the request id: it tells of a task that may have to be paid.
    pub(super) keeps_hint: bool,
    /// Task of a create. It is never shortened, since the line may be the only trace of a paid task.
    pub(super) task: Option<String>,
    /// Name of the client, and the start of the request id.
    pub(super) who: Option<String>,
}

/// Greatest width of a line, in columns, however wide the terminal is.
pub(super) const WIDEST: usize = 110;
/// Space between two parts.
pub(super) const SEPARATOR: &str = "  ";

/// Width to which a path is shortened before other parts, in columns: enough for `…/image2video`.
const NARROW_PATH: usize = 14;
/// Width to which a hint is shortened before other parts are left out, in columns.
const NARROW_HINT: usize = 16;
/// Width to which methods are padded, in columns.
const METHOD_WIDTH: usize = 4;

// === impl RequestLine ===

impl RequestLine {
    /// Shortens the path, and then the hint, until the line has at most this width. If that is not
    /// enough, leaves out the duration, and then the request id.
    pub(super) fn fit(mut self, width: usize) -> Self {
        let path = columns(&self.path);
        let hint = self.hint.as_deref().map_or(0, columns);
        let narrow_hint = if self.keeps_hint {
            hint
        } else {
            hint.min(NARROW_HINT)
        };
        let least = path.min(NARROW_PATH) + narrow_hint;
        let mut room = width.saturating_sub(self.rest());
        while room < least && (self.duration.take().is_some() || self.who.take().is_some()) {
            room = width.saturating_sub(self.rest());
        }
        let for_path = room.saturating_sub(hint).max(NARROW_PATH);
        self.path = shorten_path(&self.path, for_path).into_owned();
        let for_hint = room.saturating_sub(columns(&self.path)).max(NARROW_HINT);
        self.hint = self.hint.map(|hint| cut(&hint, for_hint).into_owned());
        self
    }

    /// Returns the line with its colours.
    pub(super) fn paint(self, palette: Palette) -> String {
        let tone = self.tone;
        let strings = self.parts().into_iter().map(|(part, text)| {
            let tone = match part {
                Part::Status | Part::Hint => tone,
                Part::Target => Tone::Normal,
                Part::Task => Tone::Strong,
                Part::Other => Tone::Faint,
            };
            palette.paint(tone, text).to_string()
        });
        strings.collect::<Vec<_>>().join(SEPARATOR)
    }

    /// Returns the width of the line without path and hint.
    fn rest(&self) -> usize {
        let parts = self.parts();
        let separators = SEPARATOR.len() * parts.len().saturating_sub(1);
        let whole: usize = parts.iter().map(|(_, text)| columns(text)).sum();
        whole + separators - columns(&self.path) - self.hint.as_deref().map_or(0, columns)
    }

    fn parts(&self) -> Vec<(Part, Cow<'_, str>)> {
        let path = &self.path;
        let target = match &self.method {
            Some(method) => Cow::from(format!("{method:METHOD_WIDTH$} {path}")),
            None => Cow::from(path),
        };
        let optional = [
            (Part::Other, &self.duration),
            (Part::Hint, &self.hint),
            (Part::Task, &self.task),
            (Part::Other, &self.who),
        ];
        let optional = optional
            .into_iter()
            .filter_map(|(part, text)| Some((part, Cow::from(text.as_deref()?))));
        let first = [
            (Part::Other, Cow::from(&self.time)),
            (Part::Status, Cow::from(&self.status)),
            (Part::Target, target),
        ];
        first.into_iter().chain(optional).collect()
    }
}

/// Kind of a part, for its colour.
#[derive(Clone, Copy)]
enum Part {
    Status,
    /// Method and path.
    Target,
    Hint,
    Task,
    Other,
}

/// Returns the end of a path, from the beginning of a segment if one fits.
fn shorten_path(path: &str, room: usize) -> Cow<'_, str> {
    if columns(path) <= room {
        return path.into();
    }
    let segments = path.match_indices('/').map(|(index, _)| &path[index..]);
    if let Some(end) = segments.skip(1).find(|end| columns(end) < room) {
        return format!("…{end}").into();
    }
    let mut end = path;
    while columns(end) >= room.max(1) {
        let mut chars = end.chars();
        chars.next();
        end = chars.as_str();
    }
    format!("…{end}").into()
}

/// Returns the beginning of a text, so that it takes at most this number of columns on a terminal.
pub fn cut(text: &str, room: usize) -> Cow<'_, str> {
    if columns(text) <= room {
        return text.into();
    }
    let mut beginning = text;
    while columns(beginning) >= room.max(1) {
        let mut chars = beginning.chars();
        chars.next_back();
        beginning = chars.as_str();
    }
    format!("{}…", beginning.trim_end()).into()
}

/// Returns the number of columns that a text takes on a terminal.
pub fn columns(text: &str) -> usize {
    text.chars().map(|c| if is_wide(c) { 2 } else { 1 }).sum()
}

/// Returns true for the characters of Chinese, Japanese and Korean, and for emoji, which take two columns
/// (Unicode Standard Annex 11, East Asian Width).
fn is_wide(c: char) -> bool {
    matches!(c,
        '\u{1100}'..='\u{115f}' | '\u{2e80}'..='\u{a4cf}' | '\u{ac00}'..='\u{d7a3}'
        | '\u{f900}'..='\u{faff}' | '\u{fe30}'..='\u{fe6f}' | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}' | '\u{1f300}'..='\u{1faff}' | '\u{20000}'..='\u{3fffd}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_keeps_its_end() {
        for (path, room, shown) in [
            ("/v1/videos/text2video", 21, "/v1/videos/text2video"),
            ("/v1/videos/text2video", 20, "…/videos/text2video"),
            ("/v1/videos/text2video", 18, "…/text2video"),
            ("/v1/videos/text2video", 13, "…/text2video"),
            ("/v1/videos/text2video", 11, "…text2video"),
            ("/v1/videos/text2video", 10, "…ext2video"),
            ("/v1/videos/text2video", 1, "…"),
        ] {
            assert_eq!(shorten_path(path, room), shown, "{room}");
        }
    }

    #[test]
    fn text_keeps_its_beginning() {
        for (text, room, shown) in [
            ("buy a pack", 10, "buy a pack"),
            ("buy a pack", 9, "buy a pa…"),
            ("buy a pack", 7, "buy a…"),
            ("购买资源包", 10, "购买资源包"),
            ("购买资源包", 9, "购买资源…"),
            ("buy", 0, "…"),
        ] {
            assert_eq!(cut(text, room), shown, "{room}");
        }
    }

    /// The widths of the parts decide what is left out.
    #[test]
    fn task_is_never_shortened() {
        let line = RequestLine {
            time: "21:31:20".to_owned(),
            status: "200".to_owned(),
            tone: Tone::Good,
            method: Some("POST".to_owned()),
            path: "/v1/videos/text2video".to_owned(),
            duration: Some("35 ms".to_owned()),
            hint: None,
            keeps_hint: false,
            task: Some("task 104454366743201459".to_owned()),
            who: Some("studio 740fee2a".to_owned()),
        };
        for (width, shown) in [
            (
                90,
                "21:31:20  200  POST /v1/videos/text2video  35 ms  task 104454366743201459  studio 740fee2a",
            ),
            (
                84,
                "21:31:20  200  POST …/text2video  35 ms  task 104454366743201459  studio 740fee2a",
            ),
            (
                80,
                "21:31:20  200  POST …/text2video  task 104454366743201459  studio 740fee2a",
            ),
            (
                70,
                "21:31:20  200  POST /v1/videos/text2video  task 104454366743201459",
            ),
            (
                10,
                "21:31:20  200  POST …/text2video  task 104454366743201459",
            ),
        ] {
            let text = line.clone().fit(width).paint(Palette::Plain);
            assert_eq!(text, shown, "{width}");
        }
    }
}
