//! Output of a task, in the words of either generation of the API. Shapes are those of Kling's pages (see
//! `endpoints`).

use serde_json::{Value, json};

use super::endpoints::Output;
use super::task_view::TaskView;

// === impl TaskView ===

impl TaskView<'_> {
    /// Returns the `task_result` of the legacy API.
    pub(super) fn result(&self) -> Value {
        let numbered = |(index, url)| json!({ "index": index, "url": url });
        match self.task.endpoint.output {
            Output::Video | Output::ChildVideo => json!({ "videos": [self.video()] }),
            Output::VideoSound => json!({ "videos": [self.video()], "audios": [self.sound()] }),
            Output::Images | Output::TryOn => {
                let images: Value = self.images().enumerate().map(numbered).collect();
                json!({ "images": images })
            }
            Output::Series => {
                let images: Value = self.images().enumerate().map(numbered).collect();
                match self.echo("result_type").as_str() {
                    Some("series") => {
                        json!({ "result_type": "series", "images": [], "series_images": images })
                    }
                    _ => json!({ "result_type": "single", "images": images, "series_images": [] }),
                }
            }
            Output::Shots => {
                let images: Vec<_> = self.images().collect();
                let shots = images.chunks(3).enumerate().map(|(index, urls)| {
                    json!({ "index": index, "url_1": urls[0], "url_2": urls[1], "url_3": urls[2] })
                });
                json!({ "images": shots.collect::<Value>() })
            }
            Output::Sound => json!({ "audios": [self.sound()] }),
            Output::Speech => json!({ "audios": [
                { "id": self.product(), "url": self.file(".mp3"), "duration": "1" },
            ] }),
            Output::Element => json!({ "elements": [self.element()] }),
            Output::Voice => json!({ "voices": [{
                "voice_id": self.product(),
                "voice_name": self.echo("voice_name"),
                "trial_url": self.file(".mp3"),
                "owned_by": self.owner(),
            }] }),
            _ => json!({}),
        }
    }

    /// Returns the `outputs` of the new standard.
    pub(super) fn outputs(&self) -> Value {
        let video = || {
            json!({
                "type": "video", "id": self.product(), "url": self.file(".mp4"), "duration": "2",
            })
        };
        let sound = || {
            json!({
                "type": "audio", "id": self.product(),
                "mp3_url": self.file(".mp3"), "wav_url": self.file(".wav"),
                "mp3_duration": "1", "wav_duration": "1",
            })
        };
        match self.task.endpoint.output {
            Output::Video | Output::ChildVideo => json!([video()]),
            Output::VideoSound => json!([video(), sound()]),
            Output::Sound => json!([sound()]),
            Output::Images | Output::TryOn | Output::Series | Output::Shots => self
                .images()
                .map(|url| json!({ "type": "image", "url": url }))
                .collect(),
            Output::Element => json!([{
                "type": "element",
                "id": self.product(),
                "name": self.echo("element_name"),
                "description": self.echo("element_description"),
                "element_type": if self.is_of_video() { "video_character_elements" } else { "multi_image_elements" },
                "references": if self.is_of_video() {
                    json!([{ "type": "video", "role": "refer", "url": self.file(".mp4") }])
                } else {
                    json!([
                        { "type": "image", "role": "frontal", "url": self.file("-0.png") },
                        { "type": "image", "role": "reference", "url": self.file("-1.png") },
                    ])
                },
                "owned_by": self.owner(),
                "status": self.state("succeeded"),
                "tags": [],
            }]),
            Output::Voice => json!([{
                "type": "voice",
                "id": self.product(),
                "name": self.echo("voice_name"),
                "url": self.file(".mp3"),
                "owned_by": self.owner(),
                "status": self.state("succeeded"),
            }]),
            _ => json!([]),
        }
    }

    /// Returns an element of the older service.
    pub(super) fn old_element(&self) -> Value {
        json!({
            "element_id": self.task.product,
            "element_name": self.echo("element_name"),
            "element_description": self.echo("element_description"),
            "element_frontal_image": self.file("-0.png"),
            "element_refer_list": [{ "image_url": self.file("-1.png") }],
            "tag_list": [],
            "owned_by": self.owner(),
        })
    }

    fn element(&self) -> Value {
        let (images, videos) = if self.is_of_video() {
            (
                json!({}),
                json!({ "refer_videos": [{ "video_url": self.file(".mp4") }] }),
            )
        } else {
            let others = json!([{ "image_url": self.file("-1.png") }]);
            let images = json!({ "frontal_image": self.file("-0.png"), "refer_images": others });
            (images, json!({}))
        };
        json!({
            "element_id": self.task.product, // a number, although it has 18 digits
            "element_name": self.echo("element_name"),
            "element_description": self.echo("element_description"),
            "reference_type": if self.is_of_video() { "video_refer" } else { "image_refer" },
            "element_image_list": images,
            "element_video_list": videos,
            "element_voice_info": {},
            "tag_list": [],
            "owned_by": self.owner(),
            "status": self.state("succeed"),
        })
    }

    fn video(&self) -> Value {
        let mut video = json!({
            "id": self.product(), "url": self.file(".mp4"), "duration": "2",
        });
        let session = self.echo("session_id");
        // A lip sync names a session too, but it makes a child video, whose result has no session.
        if session.is_string() && self.task.endpoint.output == Output::Video {
            video["session_id"] = session;
        }
        video
    }

    fn sound(&self) -> Value {
        json!({
            "id": self.product(),
            "url_mp3": self.file(".mp3"), "url_wav": self.file(".wav"),
            "duration_mp3": "1", "duration_wav": "1",
        })
    }

    fn images(&self) -> impl Iterator<Item = String> {
        let count = match self.task.endpoint.output {
            Output::Shots => 9,
            _ => self.task.request.count,
        };
        (0..count).map(|index| self.file(&format!("-{index}.png")))
    }

    pub(super) fn product(&self) -> String {
        self.task.product.to_string()
    }

    /// Returns a field of the create request, or null if it is absent.
    pub(super) fn echo(&self, name: &str) -> Value {
        let value = self.task.request.echo.get(name);
        value.cloned().unwrap_or_default()
    }

    fn is_of_video(&self) -> bool {
        self.echo("reference_type") == "video_refer"
    }

    /// Returns the status of the output, which may have been deleted.
    fn state(&self, success: &'static str) -> &'static str {
        if self.task.is_deleted {
            "deleted"
        } else {
            success
        }
    }
}
