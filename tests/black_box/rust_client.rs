//! A Rust program that uses reqwest knows a base URL and nothing else: no key, no way to make a token.

use std::io;

use futures_util::stream;
use reqwest::{Body, Client};
use rustls::crypto::ring;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::support::{Command, PATIENCE, PAUSE, started};

const VIDEOS: &str = "/v1/videos/text2video";

fn client() -> Client {
    // The program's own reqwest comes without a provider of cryptography, and cargo builds one for both.
    // Another test may have installed it already.
    let _ = ring::default_provider().install_default();
    Client::builder()
        .no_proxy()
        .timeout(PATIENCE)
        .build()
        .unwrap()
}

#[tokio::test]
async fn a_task_is_created_polled_and_downloaded() -> reqwest::Result<()> {
    let proxy = Command::new(["serve", "--sandbox"])
        .setting("sandbox.task_time", "200ms")
        .start();
    let (client, videos) = (client(), format!("http://{}{VIDEOS}", proxy.address));
    let order = json!({ "model_name": "kling-v2-6", "prompt": "a cat" });
    let created = client.post(&videos).json(&order).send().await?;
    let created = created.error_for_status()?.json::<Value>().await?;
    let id = created["data"]["task_id"].as_str().unwrap();
    let url = format!("{videos}/{id}");
    let succeeded = async {
        loop {
            let answer = client.get(&url).send().await?.error_for_status()?;
            let mut task = answer.json::<Value>().await?["data"].take();
            if task["task_status"] == "succeed" {
                break reqwest::Result::Ok(task["task_result"]["videos"][0]["url"].take());
            }
            sleep(PAUSE).await;
        }
    };
    let video = timeout(PATIENCE, succeeded).await.unwrap()?;
    let file = client.get(video.as_str().unwrap()).send().await?;
    assert_eq!(file.headers()["content-type"], "video/mp4");
    assert_eq!(&file.bytes().await?[4..8], b"ftyp");
    Ok(())
}

#[tokio::test]
async fn an_error_has_a_status_a_kind_and_a_solution() -> reqwest::Result<()> {
    let proxy = Command::new(["serve", "--sandbox"]).start();
    let order = json!({ "model_name": "kling-v2-6", "prompt": "sandbox:1102" });
    let url = format!("http://{}{VIDEOS}", proxy.address);
    let answer = client().post(url).json(&order).send().await?;
    assert!(answer.error_for_status_ref().is_err());
    assert_eq!(
        answer.headers()["kling-proxy-error"],
        "resource_pack_depleted"
    );
    assert_eq!(answer.headers()["x-should-retry"], "false");
    let body = answer.json::<Value>().await?;
    assert_eq!(body["code"], 1102);
    assert!(body["error"]["solution"].is_string(), "{body}");
    Ok(())
}

#[tokio::test]
async fn a_body_of_unknown_length_arrives_whole() -> reqwest::Result<()> {
    let (upstream, proxy) = started();
    let pieces = ["{\"image\":\"", "iVBORw0KGgo=", "\"}"];
    let body = Body::wrap_stream(stream::iter(pieces.map(Ok::<_, io::Error>)));
    let url = format!("http://{}/v1/videos/image2video", proxy.address);
    let answer = client().post(url).body(body).send().await?;
    assert_eq!(answer.status(), 200);
    assert_eq!(upstream.last().body, pieces.concat().as_bytes());
    Ok(())
}
