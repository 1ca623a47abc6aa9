//! Layers of settings: defaults, file, variables and flags. figment merges them by key, and keeps the source
//! of each value.

use std::path::{Path, PathBuf};

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::SettingProblem;
use crate::auth::trusted_file::{self, TrustedFileError};
use crate::environment::Environment;

/// The lowest layer, and the list of known keys.
const DEFAULTS: &str = include_str!("../../config/default.toml");
/// Source of the values of the lowest layer.
pub(super) const DEFAULT: &str = "default";
/// Prefix of the environment variables that hold settings.
const PREFIX: &str = "KLING_PROXY_";
/// Environment variable with the path of the configuration file.
const CONFIG: &str = "KLING_PROXY_CONFIG";
/// Prefixes of variables that Kubernetes sets for a Service called `kling-proxy`. They hold no settings.
const KUBERNETES: [&str; 2] = ["KLING_PROXY_PORT", "KLING_PROXY_SERVICE_"];

/// Settings from the command line.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// Path from `--config` of the configuration file.
    pub config: Option<PathBuf>,
    /// Key, flag and value of each setting.
    pub values: Vec<(&'static str, &'static str, String)>,
}

/// The settings of all layers, merged by key.
pub(super) struct Layers {
    figment: Figment,
    defaults: Figment,
    /// All known keys, sorted by name.
    pub(super) keys: Vec<String>,
}

/// Values from one source: the defaults, the file, a variable or a flag.
struct Layer {
    source: String,
    values: Dict,
}

// === impl Layers ===

impl Layers {
    /// Reads all layers. Leaves out each value that cannot be read and each key that is not known, and adds a
    /// problem for it.
    pub(super) fn read(
        flags: &Flags,
        environment: &Environment,
        problems: &mut Vec<SettingProblem>,
    ) -> Self {
        let defaults = Layer {
            source: DEFAULT.to_owned(),
            values: default_values(),
        };
        let keys = defaults.keys();
        let mut layers = Vec::from_iter(file(flags, environment, problems));
        layers.extend(variables(environment, problems));
        layers.extend(flags.values.iter().map(|(key, flag, value)| Layer {
            source: (*flag).to_owned(),
            values: nested(key, value.clone().into()),
        }));

        let defaults = Figment::from(defaults);
        let mut figment = defaults.clone();
        for mut layer in layers {
            for key in layer.keys() {
                if !keys.contains(&key) {
                    problems.push(unknown(&layer.source, &key, &keys));
                    forget(&mut layer.values, &key);
                }
            }
            figment = figment.merge(layer);
        }
        Self {
            figment,
            defaults,
            keys,
        }
    }

    /// Returns the value of a key, and its source.
    pub(super) fn find(&self, key: &str) -> Option<(Value, String)> {
        let value = self.figment.find_value(key).ok()?;
        let source = self
            .figment
            .get_metadata(value.tag())?
            .name
            .clone()
            .into_owned();
        Some((value, source))
    }

    /// Returns the default of a key.
    pub(super) fn default(&self, key: &str) -> Option<Value> {
        self.defaults.find_value(key).ok()
    }
}

// === impl Layer ===

impl Layer {
    fn keys(&self) -> Vec<String> {
        let leaves = leaves(&self.values);
        leaves.into_iter().map(|(key, _)| key).collect()
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

fn default_values() -> Dict {
    // The constant is valid: every test that loads settings parses it.
    parse(DEFAULTS).unwrap_or_default()
}

/// Reads the settings file: the one that a flag or a variable names, else the one in the configuration
/// folder, if it exists.
fn file(
    flags: &Flags,
    environment: &Environment,
    problems: &mut Vec<SettingProblem>,
) -> Option<Layer> {
    let named = flags.config.clone();
    let named = named.or_else(|| environment.get(CONFIG).map(PathBuf::from));
    let usual = || {
        let folder = environment.get("XDG_CONFIG_HOME").map(PathBuf::from);
        let home = || Some(Path::new(environment.get("HOME")?).join(".config"));
        let path = folder.or_else(home)?.join("kling-proxy/config.toml");
        path.exists().then_some(path)
    };
    let path = named.or_else(usual)?;
    let source = path.display().to_string();
    match read_file(&path) {
        Ok(values) => Some(Layer { source, values }),
        Err(reason) => {
            problems.push(SettingProblem::new(source, reason));
            None
        }
    }
}

fn read_file(path: &Path) -> Result<Dict, String> {
    let told = |error| match error {
        TrustedFileError::Io(error) => format!("cannot be read: {error}"),
        untrusted => untrusted.to_string(),
    };
    let file = trusted_file::read(path).map_err(told)?;
    parse(file.text().map_err(told)?)
}

/// Parses TOML. The error quotes nothing of the text, which may hold a secret.
fn parse(text: &str) -> Result<Dict, String> {
    toml::from_str(text).map_err(|error: toml::de::Error| {
        let before = error
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        let what = if error.message().contains("duplicate key") {
            "a key is set twice"
        } else {
            "not valid TOML; texts need quotes"
        };
        format!("line {}: {what}", before.matches('\n').count() + 1)
    })
}

/// Makes one layer per variable, so that the source of each value is the name of its variable.
fn variables(environment: &Environment, problems: &mut Vec<SettingProblem>) -> Vec<Layer> {
    let mut layers = Vec::new();
    for (name, value) in environment.variables() {
        let Some(name) = name.to_str() else { continue };
        let Some(key) = name.strip_prefix(PREFIX) else {
            continue;
        };
        if name == CONFIG || KUBERNETES.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        match value.to_str() {
            None => problems.push(SettingProblem::new(name, "its value is not UTF-8")),
            Some("") => {}
            Some(value) => {
                let key = key.to_ascii_lowercase().replace("__", ".");
                let values = nested(&key, list_or_text(value));
                layers.push(Layer {
                    source: name.to_owned(),
                    values,
                });
            }
        }
    }
    layers
}

/// Reads the value of a variable. `["a","b"]` is a list; any other value stays a text, also a key that has
/// digits only.
fn list_or_text(value: &str) -> Value {
    #[derive(serde::Deserialize)]
    struct One {
        list: Vec<Value>,
    }
    let list = value
        .trim_start()
        .starts_with('[')
        .then(|| format!("list = {value}"));
    match list.and_then(|list| toml::from_str(&list).ok()) {
        Some(One { list }) => Value::from(list),
        None => Value::from(value),
    }
}

fn nested(key: &str, value: Value) -> Dict {
    match key.split_once('.') {
        Some((first, rest)) => Dict::from([(first.to_owned(), Value::from(nested(rest, value)))]),
        None => Dict::from([(key.to_owned(), value)]),
    }
}

/// Lists all values of a nested dictionary with their dotted keys. A name that contains a dot is quoted, as
/// in TOML.
fn leaves(values: &Dict) -> Vec<(String, &Value)> {
    let mut leaves = Vec::new();
    for (name, value) in values {
        let name = if name.contains('.') {
            format!("{name:?}")
        } else {
            name.clone()
        };
        match value.as_dict() {
            Some(inner) => leaves.extend(
                self::leaves(inner)
                    .into_iter()
                    .map(|(key, value)| (format!("{name}.{key}"), value)),
            ),
            None => leaves.push((name, value)),
        }
    }
    leaves
}

fn forget(values: &mut Dict, key: &str) {
    match key.split_once('.') {
        Some((first, rest)) => {
            if let Some(Value::Dict(_, inner)) = values.get_mut(first) {
                forget(inner, rest);
            }
        }
        None => {
            values.remove(key);
        }
    }
}

fn unknown(source: &str, key: &str, keys: &[String]) -> SettingProblem {
    // Compares `_` and `.` as equal, since a user may forget the second `_` between two levels of a variable.
    let flat = |key: &str| key.replace('.', "_");
    let nearest = keys
        .iter()
        .max_by(|a, b| {
            let [a, b] = [a, b].map(|known| strsim::jaro_winkler(&flat(key), &flat(known)));
            a.total_cmp(&b)
        })
        .map(String::as_str)
        .unwrap_or_default();
    if source.starts_with(PREFIX) {
        let variable = format!(
            "{PREFIX}{}",
            nearest.to_ascii_uppercase().replace('.', "__")
        );
        SettingProblem::new(
            source,
            format!("no such setting; the nearest is {variable}"),
        )
    } else {
        SettingProblem::new(
            source,
            format!("no such key: `{key}`; the nearest is `{nearest}`"),
        )
    }
}
