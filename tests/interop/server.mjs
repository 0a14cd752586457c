// Starts aimock on a free port with fixtures.json, prints its address, and ends with its stdin.
// GET /observed/aborted lists the paths of requests whose client hung up before the answer's end.
import { createServer, loadFixtureFile } from "@copilotkit/aimock";

const aborted = [];

const observer = {
  async handleRequest(_request, response, path) {
    if (path !== "/aborted") return false;
    response.writeHead(200, { "Content-Type": "application/json" });
    response.end(JSON.stringify(aborted));
    return true;
  },
};

const fixtures = loadFixtureFile(new URL("fixtures.json", import.meta.url).pathname);
const { server, url } = await createServer(fixtures, { port: 0, chunkSize: 8 }, [
  { path: "/observed", handler: observer },
]);
server.on("request", (request, response) => {
  response.on("close", () => {
    if (!response.writableFinished) aborted.push(request.url);
  });
});
console.log(url);

process.stdin.on("end", () => process.exit(0)).resume();
