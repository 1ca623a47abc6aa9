//! Reads `log.filter`: levels and targets, as `RUST_LOG` has them.
//!
//! `Targets` takes any word that is no level for a target, and logs nothing else. So `warning` would turn
//! off all lines, those of paid tasks included. Here such a word is refused.

use tracing_subscriber::filter::{LevelFilter, Targets};

/// The words for a level, from no lines to all.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Reads a list of `level` and `target=level`.
///
/// # Errors
///
/// The reason, or `None` if the text has characters that no directive has. `RUST_LOG` may also name
/// spans, in brackets; these are refused.
pub(super) fn read(text: &str) -> Result<Targets, Option<String>> {
    let directives = text.split(',').map(str::trim);
    let directives = directives.filter(|directive| !directive.is_empty());
    directives
        .map(|directive| check(directive).map(|()| directive))
        .collect::<Result<Vec<_>, _>>()?
        .join(",")
        .parse()
        .map_err(|_| None)
}

fn check(directive: &str) -> Result<(), Option<String>> {
    let is_known = |c: char| c.is_ascii_alphanumeric() || "_-:=".contains(c);
    if !directive.chars().all(is_known) {
        return Err(None);
    }
    match directive.split_once('=') {
        None if is_level(directive) => Ok(()),
        None => Err(Some(match nearest_level(directive) {
            Some(level) => format!("`{directive}` is not a level; the nearest is `{level}`"),
            None => format!(
                "`{directive}` is not a level, and a target needs one: `{}=debug`",
                directive.replace('-', "_")
            ),
        })),
        Some((target, _)) if target.contains('-') => Err(Some(format!(
            "no target has a hyphen; the nearest to `{target}` is `{}`",
            target.replace('-', "_")
        ))),
        Some((_, level)) if is_level(level) => Ok(()),
        Some((_, level)) => Err(Some(match nearest_level(level) {
            Some(nearest) => format!("`{level}` is not a level; the nearest is `{nearest}`"),
            None => format!("`{level}` is not a level; levels are {}", LEVELS.join(", ")),
        })),
    }
}

fn is_level(word: &str) -> bool {
    !word.is_empty() && word.parse::<LevelFilter>().is_ok()
}

/// Returns the level that a word was probably meant to be.
fn nearest_level(word: &str) -> Option<&'static str> {
    let word = word.to_ascii_lowercase();
    let likeness = |level: &str| strsim::jaro_winkler(&word, level);
    let nearest = LEVELS
        .into_iter()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    nearest.filter(|level| likeness(level) > 0.8)
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn filter_is_a_list_of_levels_and_targets() {
        for text in ["info,kling_proxy=debug", " INFO, kling_proxy=debug ,"] {
            let filter = read(text).unwrap();
            let logs = |target: &str, level| filter.would_enable(target, &level);
            assert!(logs("kling_proxy::stack", Level::DEBUG), "{text}");
            assert!(!logs("kling_proxy::stack", Level::TRACE), "{text}");
            assert!(logs("hyper", Level::INFO), "{text}");
            assert!(!logs("hyper", Level::DEBUG), "{text}");
        }
        for level in LEVELS {
            assert!(read(level).is_ok(), "{level}");
        }
    }

    #[test]
    fn wrong_words_are_refused_with_the_nearest_right_one() {
        for (text, reason) in [
            ("warning", "`warning` is not a level; the nearest is `warn`"),
            ("infos", "`infos` is not a level; the nearest is `info`"),
            ("inof", "`inof` is not a level; the nearest is `info`"),
            (
                "tracing",
                "`tracing` is not a level; the nearest is `trace`",
            ),
            (
                "kling-proxy",
                "`kling-proxy` is not a level, and a target needs one: `kling_proxy=debug`",
            ),
            (
                "info,hyper",
                "`hyper` is not a level, and a target needs one: `hyper=debug`",
            ),
            (
                "info,kling-proxy=debug",
                "no target has a hyphen; the nearest to `kling-proxy` is `kling_proxy`",
            ),
            (
                "kling_proxy=warning",
                "`warning` is not a level; the nearest is `warn`",
            ),
            (
                "kling_proxy=loud",
                "`loud` is not a level; levels are off, error, warn, info, debug, trace",
            ),
            (
                "kling_proxy=",
                "`` is not a level; levels are off, error, warn, info, debug, trace",
            ),
        ] {
            assert_eq!(read(text), Err(Some(reason.to_owned())), "{text}");
        }
        for text in [
            "kling_proxy[request]",
            "[request{id=1}]=debug",
            "\"info\"",
            "*=debug",
        ] {
            assert_eq!(read(text), Err(None), "{text}");
        }
    }
}
