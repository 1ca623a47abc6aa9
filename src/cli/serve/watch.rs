//! Notices that a file of a credential changed.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::time::sleep;

use crate::credentials::Places;
use crate::error::chain;
use crate::token::Tokens;

/// How often files are read again. Kubernetes and Docker swap them in ways that notifications miss.
const INTERVAL: Duration = Duration::from_secs(5);

/// Takes changed credentials over, at the latest after [`INTERVAL`] and at once on SIGHUP; keeps
/// what there is while the files are wrong. Without files, nothing can change.
pub(super) async fn credentials(places: Option<Places>, tokens: Arc<Tokens>, mut hang_up: Signal) {
    let mut warned = None;
    loop {
        let due = async {
            match &places {
                Some(_) => sleep(INTERVAL).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            _ = hang_up.recv() => tracing::info!(files = places.is_some(), "SIGHUP"),
        }
        let Some(places) = &places else { continue };
        let warning = match places.find() {
            Ok(found) => {
                if tokens.replace(found.credential) {
                    tracing::info!(source = found.source, "credential changed");
                    for warning in found.warnings {
                        tracing::warn!("{warning}");
                    }
                }
                None
            }
            Err(error) => Some(chain(&error)),
        };
        if let Some(error) = &warning
            && warning != warned
        {
            tracing::warn!(error, "credential files: keeping the old ones");
        }
        warned = warning;
    }
}
