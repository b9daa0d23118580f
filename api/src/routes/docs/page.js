"use strict";
// Swagger UI shows the document of this engine and asks nobody else. A request that is tried out is sent with the session of the
// browser, or with the token that was given under "Authorize"; tokens are forgotten with the page.
window.addEventListener("DOMContentLoaded", () => {
  SwaggerUIBundle({
    url: "/api/openapi.json",
    dom_id: "#docs",
    deepLinking: true,
    docExpansion: "none",
    filter: true,
    displayRequestDuration: true,
    operationsSorter: "alpha",
    tagsSorter: "alpha",
    tryItOutEnabled: true,
    validatorUrl: null,
  });
});
