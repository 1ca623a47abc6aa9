//! Notices that a file of a credential changed.

use std::sync::Arc;
use std::time::Duration;

use crate::credentials::Places;
use crate::error::chain;
use crate::token::Tokens;

/// How often files are read again. Kubernetes and Docker swap them in ways that notifications miss.
const INTERVAL: Duration = Duration::from_secs(5);

/// Takes changed credentials over; keeps what there is while the files are wrong.
pub(super) async fn credentials(places: Places, tokens: Arc<Tokens>) {
    let mut warned = String::new();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let warning = match places.find() {
            Ok(found) => {
                if tokens.replace(found.credential) {
                    tracing::info!(source = found.source, "credential changed");
                }
                String::new()
            }
            Err(error) => chain(&error),
        };
        if warning != warned && !warning.is_empty() {
            tracing::warn!(error = warning, "credential files: keeping the old ones");
        }
        warned = warning;
    }
}
