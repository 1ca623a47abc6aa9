//! Usage of the account: the resource packs, and the ledger of deductions from them.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::create_request::invalid;
use super::listing::{API_KEY_NAME, product_type};
use super::packs::{Pack, Packs, units};
use super::page::Page;
use super::reply::Refusal;
use super::task::Task;
use super::task_view::milliseconds;

/// Time until a pack expires.
const PACK_LIFE: Duration = Duration::from_hours(365 * 24);

/// Lists the packs, inside the second envelope of `/account/costs` (Kling's page "Account Usage", as quoted
/// by `aself101/kling-api`, read 2026-11-22). The remaining quantity changes at once, not after the
/// documented 12 hours.
///
/// # Errors
///
/// 1201 if the times are missing, illegal or not in order.
pub(super) fn costs(
    parameters: &HashMap<String, String>,
    packs: &Packs,
    time: Duration,
) -> Result<Value, Refusal> {
    let start = in_ms(parameters, "start_time")?;
    if in_ms(parameters, "end_time")? < start {
        return Err(Refusal::parameter("end_time must not be before start_time"));
    }
    let info = |pack: &Pack| {
        json!({
            "resource_pack_name": pack.name,
            "resource_pack_id": pack.id,
            "resource_pack_type": "decreasing_total",
            "total_quantity": units(0),
            "remaining_quantity": units(pack.spent),
            "purchase_time": start,
            "effective_time": start,
            "invalid_time": milliseconds(time + PACK_LIFE),
            "status": "online",
        })
    };
    let wanted = parameters.get("resource_pack_name");
    let packs = [&packs.video, &packs.image].into_iter();
    let packs = packs.filter(|pack| wanted.is_none_or(|name| *name == pack.name));
    let packs: Value = packs.map(info).collect();
    Ok(json!({ "code": 0, "msg": "success", "resource_pack_subscribe_infos": packs }))
}

/// Returns a page of a ledger (Kling's pages "Unit Deduction Detail" and "Balance Deduction Detail", as
/// quoted by `aself101/kling-api`).
pub(super) fn ledger(page: &Page<'_>, packs: &Packs) -> Value {
    let detail: Value = page.tasks.iter().map(|task| entry(task, packs)).collect();
    json!({
        "result": { "detail": detail, "count": page.tasks.len() },
        "next_cursor": page.next_cursor,
        "has_more": page.has_more,
    })
}

/// Returns the ledger entry of a task. The deduction is made at the end of the task (measured by
/// `aself101/kling-api`, 2026). Guessed: the product function.
fn entry(task: &Task, packs: &Packs) -> Value {
    let before = units(task.spent_before);
    let after = units(task.spent_before + task.price());
    let product_function = task
        .endpoint
        .path
        .rsplit('/')
        .find(|part| !part.contains('{'));
    json!({
        "task_id": task.id.to_string(),
        "api_key_name": API_KEY_NAME,
        "product_function": product_function,
        "model_name": task.request.echo.get("model_name"),
        "package_id": packs.of(task.pack_type()).id,
        "product_type": product_type(task),
        "deduction_time": milliseconds(task.ended_at()).to_string(),
        "unit_before_deduction": before,
        "deduction_amount": before - after,
        "unit_after_deduction": after,
    })
}

fn in_ms(parameters: &HashMap<String, String>, name: &str) -> Result<u64, Refusal> {
    let text = parameters
        .get(name)
        .ok_or_else(|| Refusal::parameter(format!("{name} is required")))?;
    text.parse().map_err(|_| invalid(name, &json!(text)))
}
