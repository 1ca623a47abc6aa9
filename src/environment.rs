//! The environment of the process.

use std::ffi::{OsStr, OsString};

/// Environment variables, as they were at the start of the process.
#[derive(Clone, Default)]
pub struct Environment(Vec<(OsString, OsString)>);

// === impl Environment ===

impl Environment {
    /// Returns the value of a variable. An empty variable counts as unset.
    pub fn get(&self, name: &str) -> Option<&OsStr> {
        let (_, value) = self.0.iter().find(|(key, _)| key == name)?;
        (!value.is_empty()).then_some(value)
    }

    /// Returns all variables, including the empty ones.
    pub fn variables(&self) -> impl Iterator<Item = &(OsString, OsString)> {
        self.0.iter()
    }
}

impl<N: Into<OsString>, V: Into<OsString>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(variables: I) -> Self {
        let variables = variables.into_iter();
        let variables = variables.map(|(name, value)| (name.into(), value.into()));
        Self(variables.collect())
    }
}
